"""What a word is, for shingles: one table over all code points, so that C and Python agree on every script.

Each code point is folded by itself: compatibility decomposition (NFKD), case folding, decomposition again. Width, case,
ligatures and composed letters thus make no difference. What comes out is of one of four kinds:
  word       letters, marks, digits and `_`: runs of them are words;
  alone      letters, marks and digits of scripts that write without spaces (Han, kana, Thai, Lao, Tibetan, Burmese,
             Khmer): each is a word by itself;
  ignored    format characters, variation selectors and plane 14's tags: as if they were not there;
  separator  all else.
JoyAI-LLM Flash's report leaves the unit open (section 2.3.1 says 7-gram); this is the usual choice for English and
Chinese.
"""

import hashlib
import unicodedata
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

SEPARATOR, WORD, ALONE, IGNORED, SEQUENCE = range(5)
KIND_SHIFT = 28
WORDS_A_BYTE = 2  # of UTF-8, at most: U+3316 is three bytes and folds to six words; as in native/folding.h
POINTS = 0x30000  # planes 0 to 2; of those above, the kernel knows that 3 has rare Han and 14 what is ignored
SURROGATES = range(0xD800, 0xE000)
# First and last code point of scripts that write without spaces, by Unicode block.
UNSPACED = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x1AFF0, 0x1B16F),  # kana of other times
    (0x20000, 0x3FFFF),  # Han
)
# Han blocks where a code point folds to itself; all of them are `alone`, those that Unicode fills only later too.
PLAIN_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x2F7FF), (0x30000, 0x3FFFF))


def kind_of(character: str) -> int:
    """The kind of a folded character."""
    point, category = ord(character), unicodedata.category(character)
    if category == "Cf" or 0xFE00 <= point <= 0xFE0F:
        return IGNORED
    if any(first <= point <= last for first, last in PLAIN_HAN):
        return ALONE
    if category[0] in "LMN" or character == "_":
        return ALONE if any(first <= point <= last for first, last in UNSPACED) else WORD
    return SEPARATOR


def fold(character: str) -> str:
    """A character without its width, case and composition; possibly several."""
    return unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())


@dataclass(frozen=True)
class Folding:
    """table: uint32 [POINTS], kind and code point, or SEQUENCE and a place in pool; pool: uint32, counts and entries.

    fingerprint: SHA-256 of both; it differs between Unicode versions, which Python's version decides.
    """

    table: npt.NDArray[np.uint32]
    pool: npt.NDArray[np.uint32]
    fingerprint: str

    @cached_property
    def addresses(self) -> tuple[int, int, int]:
        """For kernels that check no arrays: where the table lies, its length, where the pool lies."""
        return self.table.ctypes.data, len(self.table), self.pool.ctypes.data


def _entry(character: str) -> int:
    return kind_of(character) << KIND_SHIFT | ord(character)


@cache
def folding() -> Folding:
    """The table, made once for each process (about a tenth of a second)."""
    table = np.zeros(POINTS, dtype=np.uint32)
    plain = np.zeros(POINTS, dtype=bool)
    plain[SURROGATES.start : SURROGATES.stop] = True
    for first, last in (block for block in PLAIN_HAN if block[0] < POINTS):
        points = np.arange(first, last + 1, dtype=np.uint32)
        table[points] = np.uint32(ALONE << KIND_SHIFT) | points
        plain[points] = True
    pool: list[int] = [0]
    for point in np.flatnonzero(~plain).tolist():
        character = chr(point)
        if unicodedata.category(character) in ("Cn", "Co"):
            continue  # unassigned and private: separators, which is 0
        folded = fold(character)
        if len(folded) == 1:
            table[point] = _entry(folded)
        else:
            table[point] = SEQUENCE << KIND_SHIFT | len(pool)
            pool += [len(folded), *map(_entry, folded)]
    entries = np.array(pool, dtype=np.uint32)
    return Folding(table, entries, hashlib.sha256(table.tobytes() + entries.tobytes()).hexdigest())
