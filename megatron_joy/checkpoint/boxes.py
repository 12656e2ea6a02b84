"""Parts of global tensors as boxes, the one form in which weights and optimizer state go to disk and come back.

A rank holds of a global tensor one or several boxes: an offset and the elements from there. Weights are boxes as
Megatron-core's sharded state dict gives them. Of a parameter's optimizer state a rank holds a range of the flattened
local parameter (ZeRO-1), which is at most 2 * dimensions - 1 boxes. torch.distributed.checkpoint cuts and joins boxes
of any shapes, so what one layout wrote another can read, and nothing is gathered for it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Index = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """Elements of a global tensor from `offset` on; `data` is a view that is read or filled, of as many dimensions."""

    offset: Index
    data: Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The box without its elements."""
        return ChunkStorageMetadata(offsets=torch.Size(self.offset), sizes=self.data.shape)


class Boxes(torch.Tensor):
    """This rank's boxes of one global tensor, as torch.distributed.checkpoint's planners want them.

    A tensor only in name (its shape is the global one, it has no elements): the planners ask for that.
    """

    boxes: list[Box]

    @staticmethod
    def __new__(cls, global_shape: Sequence[int], boxes: Sequence[Box]) -> "Boxes":
        """At least one box, all of one dtype."""
        self = torch.Tensor._make_wrapper_subclass(cls, torch.Size(global_shape), dtype=boxes[0].data.dtype)
        self.boxes = list(boxes)
        return self

    def __init__(self, global_shape: Sequence[int], boxes: Sequence[Box]) -> None:
        pass

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.boxes[0].data.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, box.offset, i),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=box.chunk, properties=properties, size=self.shape),
            )
            for i, box in enumerate(self.boxes)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [box.chunk for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        offset = tuple(index.offset or ())
        if index.index is not None and index.index < len(self.boxes) and self.boxes[index.index].offset == offset:
            return self.boxes[index.index].data
        return next(box.data for box in self.boxes if box.offset == offset)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"Boxes have no elements of their own to apply {func} to")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Boxes({tuple(self.shape)}, {[(box.offset, tuple(box.data.shape)) for box in self.boxes]})"


class LazyBoxes(Boxes):
    """Boxes without elements: `read(offset, size)` makes those of a box when they are written."""

    read: Callable[[Index, Index], Tensor]

    @staticmethod
    def of(
        global_shape: Sequence[int],
        dtype: torch.dtype,
        parts: Sequence[tuple[Index, Index]],
        read: Callable[[Index, Index], Tensor],
    ) -> "LazyBoxes":
        """parts: (offset, size) of each box."""
        boxes = [Box(offset, torch.empty(size, dtype=dtype, device="meta")) for offset, size in parts]
        self = LazyBoxes(global_shape, boxes)
        self.read = read
        return self

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        box = super().__get_tensor_shard__(index)
        return self.read(tuple(index.offset or ()), tuple(box.shape))


def flat_boxes(shape: Index, start: int, end: int) -> list[tuple[Index, Index]]:
    """Cuts elements [start, end) of a flattened tensor of `shape` into boxes (low, high), in order.

    Each box's elements follow each other in the flattened tensor. Example: [2, 8) of a (3, 4) tensor is the end of row
    0, ((0, 2), (1, 4)), and row 1, ((1, 0), (2, 4)).
    """
    if start >= end:
        return []
    if len(shape) == 1:
        return [((start,), (end,))]
    inside = math.prod(shape[1:])
    first, skipped = divmod(start, inside)
    last, rest = divmod(end, inside)
    if first == last:
        return _in_row(first, flat_boxes(shape[1:], skipped, rest))
    boxes = _in_row(first, flat_boxes(shape[1:], skipped, inside)) if skipped else []
    whole = first + bool(skipped)
    if whole < last:
        boxes.append(((whole, *(0 for _ in shape[1:])), (last, *shape[1:])))
    return boxes + _in_row(last, flat_boxes(shape[1:], 0, rest))


def _in_row(row: int, boxes: list[tuple[Index, Index]]) -> list[tuple[Index, Index]]:
    return [((row, *low), (row + 1, *high)) for low, high in boxes]


@dataclass(frozen=True)
class Piece:
    """Where a part of a local parameter lies in a global tensor.

    The part is the box of the parameter's elements from `low` on, of `shape`; its first element is the global tensor's
    at `offset`, whose leading dimensions that the parameter lacks (`offset` is longer than `low`) have size 1.
    """

    key: str
    global_shape: Index
    offset: Index
    low: Index
    shape: Index
    replica: Index

    def box(self, low: Index, high: Index, data: Tensor) -> Box | None:
        """What of the parameter's box [low, high), whose elements are `data`, lies in this piece, or None."""
        ends = tuple(a + n for a, n in zip(self.low, self.shape, strict=True))
        inner_low = tuple(map(max, low, self.low))
        inner_high = tuple(map(min, high, ends))
        if any(a >= b for a, b in zip(inner_low, inner_high, strict=True)):
            return None
        cut = tuple(slice(a - o, b - o) for a, b, o in zip(inner_low, inner_high, low, strict=True))
        added = len(self.offset) - len(self.low)
        moved = (o + a - p for o, a, p in zip(self.offset[added:], inner_low, self.low, strict=True))
        inner = data[cut]
        return Box((*self.offset[:added], *moved), inner.view(*(1 for _ in range(added)), *inner.shape))


def boxes_of_range(piece: Piece, shape: Index, start: int, end: int, flat: Tensor) -> list[Box]:
    """A piece's boxes among elements [start, end) of a local parameter of `shape`; `flat` [end - start] has them."""
    boxes = []
    taken = 0
    for low, high in flat_boxes(shape, start, end):
        size = tuple(b - a for a, b in zip(low, high, strict=True))
        count = math.prod(size)
        box = piece.box(low, high, flat[taken : taken + count].view(size))
        taken += count
        if box is not None:
            boxes.append(box)
    return boxes
