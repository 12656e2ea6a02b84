"""How two checkpoints differ, tensor by tensor, with memory for a part of one; whatever layouts wrote them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_joy.checkpoint.marker import Checkpoint
from megatron_joy.checkpoint.storage import Reader

Status = Literal["equal", "values", "dtype", "shape", "only in A", "only in B"]


@dataclass(frozen=True)
class Difference:
    """One tensor of two checkpoints, computed in fp64; the numbers are None where shapes differ or one lacks it.

    equal: the same dtype and bits in every element (a zero equals a zero of either sign, a NaN only one in the same
    place). max_absolute: the largest |a - b|. max_relative: the largest |a - b| / max(|a|, |b|), 0 where both are 0.
    norm_a, norm_b: Euclidean norms.
    """

    key: str
    status: Status
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    dtype_a: str | None
    dtype_b: str | None
    max_absolute: float | None = None
    max_relative: float | None = None
    norm_a: float | None = None
    norm_b: float | None = None


def differences(a: Checkpoint, b: Checkpoint, prefix: str = "") -> Iterator[Difference]:
    """Every tensor whose key starts with `prefix`, by key. Raises WorkError if a checkpoint can't be read."""
    first, second = Reader(a), Reader(b)
    for key in sorted(first.tensors.keys() | second.tensors.keys()):
        if key.startswith(prefix):
            yield _difference(key, first, second)


def _difference(key: str, a: Reader, b: Reader) -> Difference:
    entries = [reader.tensors.get(key) for reader in (a, b)]
    shape_a, shape_b = (None if entry is None else tuple(entry.size) for entry in entries)
    dtype_a, dtype_b = (
        None if entry is None else str(entry.properties.dtype).removeprefix("torch.") for entry in entries
    )
    about = (shape_a, shape_b, dtype_a, dtype_b)
    if shape_a is None or shape_b is None:
        return Difference(key, "only in A" if shape_b is None else "only in B", *about)
    if shape_a != shape_b:
        return Difference(key, "shape", *about)
    equal, largest, relative, squares = True, 0.0, 0.0, torch.zeros(2, dtype=torch.float64)
    for offset, size in a.parts(key):
        x, y = a.box(key, offset, size).double(), b.box(key, offset, size).double()
        squares += torch.stack([x.square().sum(), y.square().sum()])
        apart = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs())
        if not bool((apart == 0).all()):
            equal = False
            largest = _larger(largest, apart)
            relative = _larger(relative, torch.where(apart == 0, 0.0, apart / torch.maximum(x.abs(), y.abs())))
    status: Status = "values" if not equal else "equal" if dtype_a == dtype_b else "dtype"
    norm_a, norm_b = (math.sqrt(value) for value in squares.tolist())
    return Difference(key, status, *about, largest, relative, norm_a, norm_b)


def _larger(known: float, values: torch.Tensor) -> float:
    """The maximum, in which a NaN (a number against none) is larger than all."""
    found = float(values.max())
    return found if math.isnan(found) else max(known, found)
