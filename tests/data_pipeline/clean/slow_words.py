"""The rules that count words, in plain Python straight from their description: what the kernels must equal."""

import re
from collections import Counter
from collections.abc import Sequence

from data_pipeline.clean.gopher import GopherQualitySection, GopherRepetitionSection
from data_pipeline.clean.repeats import Parts
from data_pipeline.clean.tally import Runs, Words

WORDS = re.compile(r"\w+(?:['’.-]\w+)*|[^\w\s]+")
LETTER = re.compile(r"[^\W\d_]")
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
TOP_GRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))
REPEATED_GRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))


def count_words(text: str) -> Words:
    words, lines = WORDS.findall(text), text.splitlines()
    real = [word for word in words if word[0].isalnum() or word[0] == "_"]
    return Words(
        len(words),
        len(real),
        sum(map(len, real)),
        sum(LETTER.search(word) is not None for word in words),
        len(STOP_WORDS.intersection(words)),
        len(lines),
        sum(line.lstrip().startswith(("•", "-")) for line in lines),
        sum(line.rstrip().endswith(("...", "…")) for line in lines),
    )


def count_runs(text: str) -> Runs:
    runs = re.findall(r"\w+", text)
    return Runs(
        len(runs),
        sum(map(len, runs)),
        sum(run.lower() in STOP_WORDS for run in runs),
        len(LETTER.findall(text)),
        len(re.findall(r"[\u3400-\u9fff]", text)),
    )


def repeats_of(parts: Sequence[str]) -> Parts:
    seen: set[str] = set()
    repeats = []
    for part in parts:
        if part in seen:
            repeats.append(part)
        seen.add(part)
    return Parts(len(parts), len(repeats), sum(map(len, repeats)))


def repeated_parts(text: str) -> tuple[Parts, Parts]:
    paragraphs = re.split(r"\n{2,}", text.strip()) if text.strip() else []
    return repeats_of(paragraphs), repeats_of([line for line in text.split("\n") if line])


def grams_of(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]


def most_frequent(words: Sequence[str], n: int) -> tuple[int, int]:
    top = Counter(grams_of(words, n)).most_common(1)  # of equally frequent ones the first one
    return (top[0][1], len(" ".join(top[0][0]))) if top else (0, 0)


def covered_characters(words: Sequence[str], n: int) -> int:
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for place, gram in enumerate(grams_of(words, n)):
        if gram in seen:
            covered.update(range(place, place + n))
        seen.add(gram)
    return sum(len(words[place]) for place in covered)


def repeated_characters(words: Sequence[str], n: int) -> int:
    grams, seen = grams_of(words, n), set[tuple[str, ...]]()
    total = place = 0
    while place < len(grams):
        if grams[place] in seen:
            total += sum(map(len, grams[place]))
            place += n
        else:
            seen.add(grams[place])
            place += 1
    return total


def quality(text: str, own: GopherQualitySection) -> str | None:
    found = count_words(text)
    if found.real < max(1, own.least_words):
        return "few_words"
    checks = {
        "many_words": found.real > own.most_words,
        "short_words": found.characters / found.real < own.shortest_mean,
        "long_words": found.characters / found.real > own.longest_mean,
        "hashes": text.count("#") > own.symbols * found.words,
        "ellipses": text.count("...") + text.count("…") > own.symbols * found.words,
        "bullets": found.bullets > own.bullets * found.lines,
        "ellipsis_lines": found.ellipses > own.ellipsis_lines * found.lines,
        "letters": found.lettered < own.letters * found.words,
        "stop_words": found.stop_words < own.stop_words,
    }
    return next((reason for reason, meets in checks.items() if meets), None)


def repetition(text: str, own: GopherRepetitionSection) -> str | None:
    for name, found in zip(("paragraph", "line"), repeated_parts(text), strict=True):
        if found.repeats > own.parts * found.parts:
            return f"{name}s"
        if found.characters > own.characters * len(text):
            return f"{name}_characters"
    words, most = WORDS.findall(text), own.grams * len(text)
    for n, share in TOP_GRAMS:
        times, characters = most_frequent(words, n)
        if times * characters > share * most:
            return "top_grams"
    if any(repeated_characters(words, n) > share * most for n, share in REPEATED_GRAMS):
        return "repeated_grams"
    return None
