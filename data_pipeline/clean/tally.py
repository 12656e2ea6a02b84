"""What rules and scores count in a text, by the C kernels: words, lines, letters; one pass each."""

import ctypes
from typing import NamedTuple

from data_pipeline.clean.characters import classes_address
from data_pipeline.native.library import kernels

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")  # Gopher's; up to four letters of ASCII each
_PACKED = (ctypes.c_uint32 * len(STOP_WORDS))(*(int.from_bytes(word.encode(), "little") for word in STOP_WORDS))


class Words(NamedTuple):
    """Counts of the words of clean/words.py and of lines as `str.splitlines` cuts them."""

    words: int
    real: int  # words that are no marks
    characters: int  # of real words
    lettered: int  # words with a letter
    stop_words: int  # how many different ones
    lines: int
    bullets: int  # lines that begin with a bullet
    ellipses: int  # lines that end with an ellipsis


class Runs(NamedTuple):
    """Counts of runs of word characters, and of characters."""

    runs: int
    characters: int  # of runs
    stop_words: int  # runs that are one, in any case
    letters: int
    han: int  # U+3400 to U+9FFF


def utf8(text: str) -> bytes:
    """The text for a kernel; lone surrogates pass as what they are, marks."""
    return text.encode("utf-8", "surrogatepass")


def count_words(text: str) -> Words:
    """Words and lines of a text."""
    content, counts = utf8(text), (ctypes.c_int64 * 8)()
    kernels().joy_count_words(content, len(content), classes_address(), _PACKED, len(_PACKED), counts)
    return Words(*counts)


def count_runs(text: str) -> Runs:
    """Runs of word characters of a text, and its letters."""
    content, counts = utf8(text), (ctypes.c_int64 * 5)()
    kernels().joy_count_runs(content, len(content), classes_address(), _PACKED, len(_PACKED), counts)
    return Runs(*counts)
