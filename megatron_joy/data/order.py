"""In which order a source's samples are read: a keyed permutation that is computed, never stored.

A Feistel network permutes the smallest power of two that holds the samples; a value that falls outside them is sent
through the network again until it falls inside ("cycle walking": J. Black and P. Rogaway, Ciphers with Arbitrary Finite
Domains, CT-RSA 2002, section 4). What is left is a permutation of exactly [0, size): nothing is built at start, nothing
is kept in memory, position k costs a few microseconds for any k, and the inverse says at which position a sample is
read. The domain is less than twice the size, so fewer than two passes are expected.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

LARGEST_SIZE = 2**62
ROUNDS = 8  # each half is replaced four times: Luby and Rackoff's four rounds, for halves of unequal width
WORD = 2**64 - 1
PERSON = b"joy-order-1"  # changes when the permutation does, so that no run silently gets another order


def round_keys(*parts: str | int) -> tuple[int, ...]:
    """ROUNDS 64-bit keys from the parts (seed, source, epoch, ...); equal parts give equal keys on any machine."""
    text = b"".join(struct.pack("<Q", len(raw)) + raw for raw in (str(part).encode() for part in parts))
    return struct.unpack(f"<{ROUNDS}Q", hashlib.blake2b(text, digest_size=8 * ROUNDS, person=PERSON).digest())


def _mix(x: Any) -> Any:
    """splitmix64's output function (Steele, Lea and Flood, OOPSLA 2014; constants: Stafford's Mix13), modulo 2^64.

    x: an int or a uint64 array; the same lines serve both.
    """
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


class Permutation:
    """A permutation of [0, size) that follows from `keys` (of `round_keys`); size from 1 to 2^62.

    `permutation[position]` and `inverse(value)` take an int; `many` and `inverse_many` take int64 [n] and give int64
    [n]. Both forms agree. Raises IndexError for what is outside [0, size).
    """

    def __init__(self, size: int, keys: Sequence[int]) -> None:
        if not 1 <= size <= LARGEST_SIZE:
            raise ValueError(f"a permutation of {size} values; expected 1 to 2^62")
        bits = (size - 1).bit_length()
        self.size, self._keys = size, tuple(keys)
        self._right_bits = bits - bits // 2
        self._left_mask, self._right_mask = (1 << bits // 2) - 1, (1 << self._right_bits) - 1

    def _forward(self, x: Any) -> Any:
        return self._network(x, enumerate(self._keys))

    def _backward(self, x: Any) -> Any:
        return self._network(x, reversed(list(enumerate(self._keys))))

    def _network(self, x: Any, rounds: Iterable[tuple[int, int]]) -> Any:
        """One pass; each round is its own inverse, so the same rounds in reverse order undo it."""
        left, right = x >> self._right_bits, x & self._right_mask
        for number, key in rounds:
            if number % 2:
                left = left ^ (_mix(right ^ key) & self._left_mask)
            else:
                right = right ^ (_mix(left ^ key) & self._right_mask)
        return (left << self._right_bits) | right

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        """The value at a position."""
        value: int = self._forward(self._checked(position))
        while value >= self.size:
            value = self._forward(value)
        return value

    def inverse(self, value: int) -> int:
        """The position of a value."""
        position: int = self._backward(self._checked(value))
        while position >= self.size:
            position = self._backward(position)
        return position

    def many(self, positions: IntArray) -> IntArray:
        """The values at positions [n]."""
        values: npt.NDArray[np.uint64] = self._forward(self._checked_many(positions))
        while (outside := np.flatnonzero(values >= self.size)).size:
            values[outside] = self._forward(values[outside])
        return values.astype(np.int64)

    def inverse_many(self, values: IntArray) -> IntArray:
        """The positions of values [n]."""
        positions: npt.NDArray[np.uint64] = self._backward(self._checked_many(values))
        while (outside := np.flatnonzero(positions >= self.size)).size:
            positions[outside] = self._backward(positions[outside])
        return positions.astype(np.int64)

    def _checked(self, number: int) -> int:
        if not 0 <= number < self.size:
            raise IndexError(f"{number} is outside 0 .. {self.size - 1}")
        return number

    def _checked_many(self, numbers: IntArray) -> npt.NDArray[np.uint64]:
        if numbers.size and (int(numbers.min()) < 0 or int(numbers.max()) >= self.size):
            raise IndexError(f"{numbers.min()} .. {numbers.max()} reaches outside 0 .. {self.size - 1}")
        return numbers.astype(np.uint64)


class SourceOrder:
    """The endless order in which one source's samples are read: epoch after epoch, each a permutation of its own.

    seed: the recipe's; fingerprint: of the source's tokens (`source.source_fingerprint`); samples: of one epoch.
    """

    def __init__(self, seed: int, fingerprint: str, samples: int) -> None:
        self.samples = samples
        # A source is read in one epoch at a time, or across the border of two.
        self._epoch = lru_cache(maxsize=4)(
            lambda epoch: Permutation(samples, round_keys(seed, fingerprint, samples, epoch))
        )

    def sample_at(self, reading: int) -> tuple[int, int]:
        """(epoch, sample index) of the source's reading number `reading`, from 0."""
        epoch, position = divmod(reading, self.samples)
        return epoch, self._epoch(epoch)[position]

    def reading_of(self, epoch: int, index: int) -> int:
        """The number of the reading that gives sample `index` in `epoch`: the inverse of `sample_at`."""
        return epoch * self.samples + self._epoch(epoch).inverse(index)
