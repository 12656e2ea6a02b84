"""False deletions and misses of decontamination on planted cases in real text, and its speed.

    python benchmarks/data/contamination.py [--megabytes 100] [--items 400]

Items are passages of 20 to 60 words cut from documents of the Python environment that are then left out of the corpus;
half of them begin with wording that a thousand corpus documents get too. Each of the first half of the items is planted
into corpus documents in five forms. A document without any planted item that goes is a false deletion, except where it
really holds 13 words of an item in a row by itself (licences, headers): such documents are counted apart, by a plain
search over strings.
"""

import argparse
import json
import random
import re
import sys
import time
from pathlib import Path

from data_pipeline.decontaminate.contamination import count_unrelated, judge, whitelist_of
from data_pipeline.decontaminate.evaluation import index_items
from data_pipeline.native.library import kernels

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.corpus import environment_texts

COMMON = "choose the one option that best answers the question and explain your answer in full sentences please"
WORDS = re.compile(r"\w+")


def plain_grams(text: str) -> set[str]:
    """Runs of 13 words by regular expression."""
    words = WORDS.findall(text.lower())
    return {" ".join(words[i : i + 13]) for i in range(len(words) - 12)}


def edited(rng: random.Random, item: str, changes: int) -> str:
    """With so many words replaced."""
    words = item.split()
    for place in rng.sample(range(len(words)), changes):
        words[place] = f"zq{rng.randrange(10**6)}"
    return " ".join(words)


def cut_items(rng: random.Random, texts: list[str], count: int) -> list[str]:
    """Passages from the middle of documents; every other one begins with the common wording."""
    found = []
    for text in texts:
        words = text.split()
        if len(words) > 200 and len(found) < count:
            length = rng.randrange(20, 61)
            start = rng.randrange(50, len(words) - length)
            passage = " ".join(words[start : start + length])
            if len(WORDS.findall(passage)) < length:
                continue  # rulers and tables
            found.append(f"{COMMON} {passage}" if len(found) % 2 else passage)
    return found


FORMS = {
    "whole": lambda rng, item: item,
    "upper case, line breaks": lambda rng, item: item.upper().replace(" ", "\n"),
    "latter half": lambda rng, item: " ".join(item.split()[-max(14, len(item.split()) // 2) :]),
    "one word changed": lambda rng, item: edited(rng, item, 1),
    "four words changed": lambda rng, item: edited(rng, item, 4),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--items", type=int, default=400)
    options = parser.parse_args()
    kernels()
    rng = random.Random(5)
    texts = [text.decode() for text in environment_texts(options.megabytes)]
    rng.shuffle(texts)
    items = cut_items(rng, texts[: 3 * options.items], options.items)
    corpus = texts[3 * options.items :]
    for number in range(0, min(len(corpus), 1000)):
        corpus[number] += f"\n{COMMON}\n"
    planted = [
        (form, corpus[rng.randrange(len(corpus))][:4000] + f"\n{plant(rng, item)}\nend of it")
        for item in items[: len(items) // 2]
        for form, plant in FORMS.items()
    ]
    index = index_items(("items", number, text) for number, text in enumerate(items))
    encoded = [text.encode() for text in corpus]
    began = time.process_time()
    whitelist = whitelist_of(
        count_unrelated(index, map(index.grams_in, [*encoded, *(text.encode() for _, text in planted)]))
    )
    gone = [number for number, text in enumerate(encoded) if judge(index, whitelist, index.grams_in(text))]
    seconds = time.process_time() - began
    known = set().union(*map(plain_grams, items)) - plain_grams(COMMON)
    wrong = sum(not (plain_grams(corpus[number]) & known) for number in gone)
    missed = {
        form: sum(judge(index, whitelist, index.grams_in(t.encode())) is None for f, t in planted if f == form)
        for form in FORMS
    }
    result = {
        "documents": len(corpus),
        "megabytes": sum(map(len, encoded)) / 1e6,
        "megabytes_per_cpu_second_of_both_passes": 2 * sum(map(len, encoded)) / 1e6 / seconds,
        "whitelisted_grams": int(whitelist.sum()),
        "gone_without_planting": len(gone),
        "of_them_false_deletions": wrong,
        "planted_of_each_form": len(items) // 2,
        "missed": missed,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
