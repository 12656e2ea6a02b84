"""How much of a text repeats itself, by the C kernels: lines, paragraphs, and n-grams of words."""

import ctypes
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.clean.characters import classes_address
from data_pipeline.native.library import kernels

Numbers = npt.NDArray[np.uint32]
# Where the kernels put things into tables, and nothing that they return: a text can't be made that is slow to look up.
KEY = int.from_bytes(os.urandom(8), "little") | 1


def _checked(result: int) -> int:
    if result < 0:
        raise MemoryError("no memory to count what a text repeats")
    return result


class Parts(NamedTuple):
    """Counts of lines or paragraphs; empty ones are none."""

    parts: int
    repeats: int  # of an earlier one
    characters: int  # of the repeats


def repeated_parts(content: bytes) -> tuple[Parts, Parts]:
    """Paragraphs (between two line feeds or more; white space around the text is no part of one) and lines of UTF-8."""
    counts = (ctypes.c_int64 * 6)()
    _checked(kernels().joy_repeated_parts(content, len(content), classes_address(), KEY, counts))
    return Parts(*counts[:3]), Parts(*counts[3:])


class Grams:
    """The n-grams of a sequence of words.

    Each is a 64-bit hash of its words' numbers; two different ones of a text share one with a chance below 1e-9.
    """

    def __init__(self, numbers: Numbers, ends: Numbers) -> None:
        """numbers: uint32 [words], equal for equal words; ends: uint32 [words + 1], characters to each word's end."""
        recurring = np.empty(len(numbers), dtype=np.uint32)
        self._words, self._arrays, self._ends = len(numbers), (numbers, recurring), ends
        self._at = (numbers.ctypes.data, ends.ctypes.data, recurring.ctypes.data)
        self._most = (ctypes.c_int64 * 3)()
        _checked(kernels().joy_count_pairs(*self._at[:2], self._words, KEY, self._at[2], self._most))

    @classmethod
    def of_text(cls, content: bytes) -> "Grams":
        """Of the words of a UTF-8 text (clean/words.py)."""
        size = len(content)
        buffer = np.empty(2 * size + 1, dtype=np.uint32)
        address = buffer.ctypes.data
        arguments = (classes_address(), KEY, address, address + size * buffer.itemsize)
        words = _checked(kernels().joy_number_words(content, size, *arguments))
        return cls(buffer[:words], buffer[size : size + words + 1])

    @classmethod
    def of_words(cls, words: Sequence[str]) -> "Grams":
        """Of any words, or of the characters of a string."""
        numbers: dict[str, int] = {}
        listed = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.uint32)
        ends = np.zeros(len(words) + 1, dtype=np.uint32)
        np.cumsum(np.fromiter(map(len, words), np.uint32, len(words)), out=ends[1:])
        return cls(listed, ends)

    def most_frequent(self, n: int) -> tuple[int, int]:
        """How often the most frequent n-gram occurs, and its characters, blanks between words too (of several the
        first one's); (0, 0) where there is none.
        """
        found = (ctypes.c_int64 * 2)()
        _checked(kernels().joy_top_gram(self._at[0], self._words, n, KEY, found))
        times, place = found
        return (times, int(self._ends[place + n]) - int(self._ends[place]) + n - 1) if times else (0, 0)

    def at_most(self, n: int) -> int:
        """A bound on the product of both, for n of 2 to 4; it is known already, from counting pairs."""
        return self._most[n - 2]

    def covered_characters(self, n: int) -> int:
        """Characters inside n-grams that occurred before; of no longer n-gram are more repeated."""
        return _checked(kernels().joy_covered_characters(*self._at, self._words, n, KEY))

    def repeated_characters(self, n: int) -> int:
        """Characters of n-grams that occurred before; from a repeat the count goes on behind it."""
        return _checked(kernels().joy_repeated_characters(*self._at, self._words, n, KEY))
