"""What words and sentences are to the rules; clean/tally.py and clean/repeats.py count such words by C kernels."""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

# A word keeps apostrophes, points and hyphens inside it (don't, 3.14, well-known); runs of other marks are words too.
WORDS = re.compile(r"\w+(?:['’.-]\w+)*|[^\w\s]+")
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
ELLIPSES = ("...", "…")
# Abbreviations that end no sentence; an untrained Punkt model knows none.
ABBREVIATIONS = frozenset(
    (
        *("mr", "mrs", "ms", "dr", "prof", "sr", "jr", "st", "vs", "etc", "e.g", "i.e", "cf", "al", "fig", "no", "vol"),
        *("pp", "p", "ed", "eds", "inc", "ltd", "co", "corp", "dept", "est", "approx", "gen", "gov", "sen", "rep"),
        *(
            "jan",
            "feb",
            "mar",
            "apr",
            "jun",
            "jul",
            "aug",
            "sep",
            "sept",
            "oct",
            "nov",
            "dec",
            "u.s",
            "u.k",
            "a.m",
            "p.m",
        ),
    )
)


def split_words(text: str) -> list[str]:
    """Words and runs of marks, in order."""
    return WORDS.findall(text)


@lru_cache(maxsize=1)
def _punkt() -> Any:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS)
    return PunktSentenceTokenizer(parameters)


def count_sentences(text: str, most: int | None = None) -> int:
    """Sentences by nltk's Punkt algorithm (Kiss & Strunk 2006) with a list of abbreviations; no data is loaded.

    With `most` it looks no further than that many.
    """
    return sum(1 for _ in islice(_punkt().span_tokenize(text), most))


def duplicate_share(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts are repeats of earlier ones, and their characters."""
    seen: set[str] = set()
    repeats = characters = 0
    for part in parts:
        if part in seen:
            repeats += 1
            characters += len(part)
        else:
            seen.add(part)
    return repeats, characters
