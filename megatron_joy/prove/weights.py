"""Whole tensors of the reference in one file, and a rank's parts held against them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_joy.checkpoint.contents import pieces_of, weight_boxes
from megatron_joy.platform.process import Process
from megatron_joy.prove.numbers import ParameterDifference


def _parts(chunks: Sequence[Any], process: Process) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]:
    """(key, global shape, offset, elements) of everything that this rank holds of the model."""
    for key, boxes in weight_boxes(pieces_of(chunks, process), to_write=False).items():
        for box in boxes.boxes:
            yield key, tuple(boxes.shape), box.offset, box.data


def write_whole(path: Path, chunks: Sequence[Any], process: Process) -> None:
    """Every tensor of a model that one process holds, by its sharded key (router biases too)."""
    whole: dict[str, Tensor] = {}
    for key, shape, offset, data in _parts(chunks, process):
        tensor = whole.setdefault(key, torch.full(shape, torch.nan, dtype=data.dtype))
        tensor[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))] = data
    save_file(whole, path)


def largest_difference(path: Path, chunks: Sequence[Any], process: Process) -> ParameterDifference:
    """This rank's parts against the same elements of the whole tensors in `path`.

    The relative difference is over the largest magnitude in the whole tensor: what a forward pass sees of it. A part
    that has no counterpart or isn't a number gives infinity.
    """
    worst = ParameterDifference("", 0.0, 0.0)
    with safe_open(path, framework="pt") as file:
        known = set(file.keys())
        scales: dict[str, float] = {}
        for key, shape, offset, data in _parts(chunks, process):
            if key not in known or tuple(file.get_slice(key).get_shape()) != shape:
                return ParameterDifference(key, float("inf"), float("inf"))
            if key not in scales:
                scales[key] = float(file.get_tensor(key).abs().max())
            place = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
            absolute = float((data.cpu().float() - file.get_slice(key)[place].float()).abs().max())
            absolute = float("inf") if absolute != absolute else absolute
            relative = absolute / scales[key] if scales[key] else (float("inf") if absolute else 0.0)
            relative = float("inf") if relative != relative else relative
            if relative > worst.relative or not worst.key:
                worst = ParameterDifference(key, absolute, relative)
    return worst
