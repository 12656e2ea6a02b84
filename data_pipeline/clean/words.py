"""Words, lines and sentences as the rules count them, and how much of a text repeats itself."""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

# A word keeps apostrophes, points and hyphens inside it (don't, 3.14, well-known); runs of other marks are words too.
WORDS = re.compile(r"\w+(?:['’.-]\w+)*|[^\w\s]+")
LETTER = re.compile(r"[^\W\d_]")
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
PARAGRAPHS = re.compile(r"\n{2,}")
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
Hashes = npt.NDArray[np.uint64]
FACTOR = np.uint64(0x9E3779B97F4A7C15)


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


class Grams:
    """The n-grams of a sequence of words.

    Each is a 64-bit hash of its words' numbers; two different ones of a text share one with a chance below 1e-9.
    """

    def __init__(self, words: Sequence[str]) -> None:
        numbers: dict[str, int] = {}
        ids = [numbers.setdefault(word, len(numbers)) for word in words]
        self._ids = (np.array(ids, dtype=np.uint64) + np.uint64(1)) * FACTOR
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        self._ends = np.concatenate([[0], np.cumsum(lengths)])

    def _hashes(self, n: int) -> Hashes:
        """Hashes [words - n + 1]."""
        count = max(0, len(self._ids) - n + 1)
        found = np.zeros(count, dtype=np.uint64)
        for step in range(n):
            found = (found ^ (found >> np.uint64(29))) * FACTOR + self._ids[step : step + count]
        return found

    def _characters(self, n: int) -> npt.NDArray[np.int64]:
        return self._ends[n:] - self._ends[:-n]

    def most_frequent(self, n: int) -> tuple[int, int]:
        """How often the most frequent n-gram occurs, and its characters, blanks between words too (of several the
        first one's); (0, 0) where there is none.
        """
        hashes = self._hashes(n)
        if not len(hashes):
            return 0, 0
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        most = counts.max()
        place = first[counts == most].min()
        return int(most), int(self._characters(n)[place] + n - 1)

    def longest(self, n: int) -> int:
        """Characters of the longest n-gram, blanks between words too."""
        sizes = self._characters(n)
        return int(sizes.max()) + n - 1 if len(sizes) else 0

    def covered_characters(self, n: int) -> int:
        """Characters inside n-grams that occurred before; of no longer n-gram are more repeated."""
        hashes = self._hashes(n)
        if not len(hashes):
            return 0
        repeated = np.ones(len(hashes), dtype=bool)
        repeated[np.unique(hashes, return_index=True)[1]] = False
        if not repeated.any():
            return 0
        edges = np.zeros(len(self._ids) + 1, dtype=np.int64)
        edges[: len(hashes)] += repeated
        edges[n : n + len(hashes)] -= repeated
        inside = np.cumsum(edges[:-1]) > 0
        return int(np.diff(self._ends)[inside].sum())

    def repeated_characters(self, n: int) -> int:
        """Characters of n-grams that occurred before; from a repeat the count goes on behind it."""
        hashes = self._hashes(n)
        if len(np.unique(hashes)) == len(hashes):
            return 0
        sizes, listed = self._characters(n).tolist(), hashes.tolist()
        seen: set[int] = set()
        total = place = 0
        while place < len(listed):
            if listed[place] in seen:
                total += sizes[place]
                place += n
            else:
                seen.add(listed[place])
                place += 1
        return total
