"""What is in a checkpoint, tensor by tensor, with memory for a part of one; in one process, without a model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_joy.checkpoint.marker import Checkpoint
from megatron_joy.checkpoint.storage import Reader


@dataclass(frozen=True)
class TensorSummary:
    """A tensor of a checkpoint. `norm` is the Euclidean one, in fp64; None where it wasn't asked for."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    norm: float | None


def summaries(checkpoint: Checkpoint, norms: bool = False, prefix: str = "") -> Iterator[TensorSummary]:
    """Every tensor whose key starts with `prefix`, by key. Raises WorkError if the checkpoint can't be read."""
    reader = Reader(checkpoint)
    for key, entry in sorted(reader.tensors.items()):
        if key.startswith(prefix):
            norm = _norm(reader, key) if norms else None
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            yield TensorSummary(key, tuple(entry.size), dtype, norm)


def _norm(reader: Reader, key: str) -> float:
    parts = (reader.box(key, offset, size).double() for offset, size in reader.parts(key))
    return math.sqrt(sum(float(torch.linalg.vector_norm(part)) ** 2 for part in parts))
