"""MinHash signatures of texts (Broder 1997) and their exact Jaccard similarity, by the C kernels.

A shingle is `gram` words in a row (words.py); its 64-bit hash stands for it. The signature's entry k is the least
a[k] * x + b[k] modulo 2^32 over the upper halves x of a text's shingle hashes, with a[k] odd. Two texts of Jaccard
similarity J agree in an entry with a chance of about J: the share of equal entries has mean J and a standard deviation
of sqrt(J (1 - J) / permutations). 7 words and 128 permutations are JoyAI-LLM Flash's (report, section 2.3.1).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import orjson

from data_pipeline.dedup.words import WORDS_A_BYTE, Folding, folding
from data_pipeline.native.library import kernels

Signatures = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
GRAM = 7
MOST_WORDS = 64  # of a shingle; as in native/kernels.c
PERMUTATIONS = 128
EMPTY = np.uint32(0xFFFFFFFF)  # every entry of the signature of a text without words


def coefficients(permutations: int, seed: int) -> tuple[Signatures, Signatures]:
    """The permutations' a (odd) and b, uint32 [permutations] each."""
    stream = hashlib.shake_256(f"MinHash permutations, seed {seed}".encode()).digest(8 * permutations)
    numbers = np.frombuffer(stream, dtype="<u4").astype(np.uint32)
    return numbers[:permutations] | np.uint32(1), numbers[permutations:].copy()


def _joined(texts: Sequence[bytes]) -> tuple[npt.NDArray[np.uint8], Numbers]:
    """The texts one after another (one spare byte, so that nothing is empty), and where each starts [texts + 1]."""
    starts = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)), out=starts[1:])
    return np.frombuffer(b"".join(texts) + b" ", dtype=np.uint8), starts


@dataclass(frozen=True)
class MinHash:
    """How texts are hashed; two signatures can be compared only if all of this is equal."""

    gram: int = GRAM
    permutations: int = PERMUTATIONS
    seed: int = 1
    _folding: Folding = field(default_factory=folding, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.gram <= MOST_WORDS:
            raise ValueError(f"gram = {self.gram}: a shingle has 1 to {MOST_WORDS} words")

    @cached_property
    def _coefficients(self) -> tuple[Signatures, Signatures]:
        return coefficients(self.permutations, self.seed)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that a signature depends on but the text."""
        content = [self.gram, self.permutations, self.seed, self._folding.fingerprint, "minhash 1"]
        return hashlib.sha256(orjson.dumps(content)).hexdigest()

    def _table(self) -> tuple[Signatures, int, Signatures]:
        return self._folding.table, len(self._folding.table), self._folding.pool

    def sign(self, texts: Sequence[bytes]) -> tuple[Signatures, Hashes, Numbers]:
        """Of UTF-8 texts: signatures uint32 [texts, permutations], the sets they are of, uint64, and where each ends.

        The sets lie one after another, each ascending: set i is sets[ends[i - 1]:ends[i]], the first from 0. A text
        without words has a signature of EMPTY and an empty set.
        """
        joined, starts = _joined(texts)
        found = np.empty((len(texts), self.permutations), dtype=np.uint32)
        sets = np.empty(WORDS_A_BYTE * int(starts[-1]) + len(texts) + 1, dtype=np.uint64)
        scratch = np.empty(WORDS_A_BYTE * int(np.diff(starts).max(initial=0)) + 1, dtype=np.uint64)
        ends = np.zeros(len(texts), dtype=np.int64)
        a, b = self._coefficients
        arguments = (*self._table(), a, b, self.permutations, self.gram, found, sets, ends, scratch)
        kernels().joy_sign(joined, starts, len(texts), *arguments)
        return found, sets[: ends[-1] if len(ends) else 0], ends

    def all_shingles(self, text: bytes) -> Hashes:
        """The hashes of a UTF-8 text's shingles, uint64, in their order, repeated ones too."""
        out = np.empty(WORDS_A_BYTE * len(text) + 1, dtype=np.uint64)
        content = np.frombuffer(text + b" ", dtype=np.uint8)
        count = kernels().joy_shingles(content, len(text), *self._table(), self.gram, out)
        return out[:count]

    def shingles(self, text: bytes) -> Hashes:
        """The set of a UTF-8 text's shingle hashes: uint64, ascending, each once."""
        hashes = np.sort(self.all_shingles(text))
        fresh = np.ones(len(hashes), dtype=bool)
        np.not_equal(hashes[1:], hashes[:-1], out=fresh[1:])  # np.unique takes longer: it hashes first
        return hashes[fresh]


def jaccard_of_rows(store: Hashes, starts: Numbers, left: Numbers, right: Numbers) -> npt.NDArray[np.float64]:
    """Exact Jaccard similarity [pairs] of rows left[i] and right[i]; row r is store[starts[r]:starts[r + 1]].

    Rows are sets as `MinHash.shingles` gives them; two empty rows are taken for different (0).
    """
    shared = np.zeros(len(left), dtype=np.int64)
    rows = (np.ascontiguousarray(left, dtype=np.int64), np.ascontiguousarray(right, dtype=np.int64))
    kernels().joy_shared(np.ascontiguousarray(store), starts, *rows, len(left), shared)
    sizes = np.diff(starts)
    together = sizes[rows[0]] + sizes[rows[1]] - shared
    return shared / np.maximum(together, 1)


def agreement(left: Signatures, right: Signatures) -> npt.NDArray[np.float64]:
    """Share of equal entries [pairs] of signatures left and right, both [pairs, permutations]."""
    share: npt.NDArray[np.float64] = (left == right).mean(axis=1)
    return share
