"""The file of a rank as it will be on disk, in host memory, so that training may go on while it is on its way there.

Everything between the tensors' elements (headers of torch's archives, their pickles and directories) depends on the
tensors' shapes alone. It is made once, by torch's own writer over tensors that stand in for the real ones; a save
copies elements into their places, and what is left to be done beside training is to hash and write bytes. To make the
archives there would be Python's work, and take its lock again and again from the thread that computes.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config

from megatron_joy.checkpoint.boxes import Box, Boxes, Index
from megatron_joy.checkpoint.writing import Plan, Tensors, planner_of

_BLOCK = 1 << 28  # bytes; a power of two, as torch rounds pinned memory up to one
Owner = tuple[str, Index]  # key of a tensor or object, offset of the box


@dataclass(frozen=True)
class _Part:
    """A stretch of the file: elements of a box or the bytes of an object (`owner`), or what lies between them."""

    size: int
    owner: Owner | None
    content: bytes


class _Recorder(io.RawIOBase):
    """Takes for a file what torch writes, and notes instead of elements whose they are."""

    def __init__(self, owners: dict[int, tuple[Owner, int]]) -> None:
        self._owners, self._size = owners, 0
        self.parts: list[_Part] = []

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if view.nbytes:
            owner, size = self._owners.get(_address(view), (None, 0))
            if size != view.nbytes:
                owner = None
            self.parts.append(_Part(view.nbytes, owner, b"" if owner else bytes(view)))
            self._size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._size

    def close(self) -> None:
        # torch closes the stream after each tensor.
        pass


class _Recording(FileSystem):
    """A file system on which files are `_Recorder`s."""

    def __init__(self, owners: dict[int, tuple[Owner, int]]) -> None:
        self._owners = owners
        self.files: dict[str, _Recorder] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """As `HashingFileSystem`'s, archives without CRC-32."""
        with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            self.files[Path(path).name] = _Recorder(self._owners)
            yield self.files[Path(path).name]


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]
    return address


class Image:
    """One rank's file of a plan; `fill` before it is written, as often as there are saves.

    name: of the file; None where this rank writes none. blocks: its bytes in order, uint8 [size of the block]; pinned
    where the tensors are a GPU's, whose copies then run at the speed of its bus. places: where in it each box lies.
    """

    def __init__(self, plan: Plan, tensors: Tensors, is_first_rank: bool) -> None:
        """Lays the file out. Raises RuntimeError if torch wrote elements in a form that can't be copied into."""
        pinned = any(box.data.is_cuda for boxes in tensors.values() if isinstance(boxes, Boxes) for box in boxes.boxes)
        stand_ins = {key: _stand_in(value) for key, value in tensors.items()}
        writer = FileSystemWriter("", single_file_per_rank=True, sync_files=False, thread_count=1)
        recording = writer.fs = _Recording(_owners(stand_ins))
        planner = planner_of(stand_ins, is_first_rank)
        planner.finish_plan(plan.mine)
        self.places: list[WriteResult] = writer.write_data(plan.mine, planner).value()
        self.name = next(iter(recording.files), None)
        parts = [] if self.name is None else recording.files[self.name].parts
        found = {part.owner for part in parts}
        for item in plan.mine.items:
            owner = (item.index.fqn, tuple(item.index.offset or ()))
            if owner not in found and (item.tensor_data is None or item.tensor_data.chunk.sizes.numel()):
                raise RuntimeError(f"torch wrote {item.index.fqn} in another form than its elements in order")
        self.blocks: list[Tensor] = []
        self._targets: dict[Owner, Tensor] = {}
        for group in _groups(parts):
            self._add_block(group, pinned)

    def _add_block(self, parts: list[_Part], pinned: bool) -> None:
        block = torch.empty(sum(part.size for part in parts), dtype=torch.uint8, pin_memory=pinned)
        start = 0
        for part in parts:
            target = block[start : start + part.size]
            if part.owner is None:
                target.copy_(torch.frombuffer(bytearray(part.content), dtype=torch.uint8))
            else:
                self._targets[part.owner] = target
            start += part.size
        self.blocks.append(block)

    def fill(self, tensors: Tensors) -> None:
        """Copies the elements of every box, and every object; returns when all are there."""
        for key, value in tensors.items():
            if not isinstance(value, Boxes):
                self._targets[key, ()].copy_(torch.frombuffer(value.getbuffer(), dtype=torch.uint8))
                continue
            for box in value.boxes:
                target = self._targets.get((key, box.offset))
                if target is not None:  # else empty, or another rank's to write
                    # As bytes: what lies before it in a file leaves a tensor at no multiple of its element's size.
                    elements = box.data.detach().contiguous().view(-1).view(torch.uint8)
                    target.copy_(elements, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()


def _stand_in(value: Any) -> Any:
    """Boxes of the same shapes that nobody has filled, so they take no memory; objects as they are."""
    if not isinstance(value, Boxes):
        return value
    boxes = [Box(box.offset, torch.empty(box.data.shape, dtype=box.data.dtype)) for box in value.boxes]
    return Boxes(value.shape, boxes)


def _owners(stand_ins: Tensors) -> dict[int, tuple[Owner, int]]:
    """By address in memory: whose elements begin there, and how many bytes they are."""
    owners: dict[int, tuple[Owner, int]] = {}
    for key, value in stand_ins.items():
        if isinstance(value, Boxes):
            owners |= {box.data.data_ptr(): ((key, box.offset), box.data.nbytes) for box in value.boxes}
        else:
            view = value.getbuffer()
            owners[_address(view)] = ((key, ()), view.nbytes)
    return owners


def _groups(parts: list[_Part]) -> Iterator[list[_Part]]:
    """Cuts a file into blocks; a part that is larger than a block is one by itself."""
    group, size = list[_Part](), 0
    for part in parts:
        if group and size + part.size > _BLOCK:
            yield group
            group, size = [], 0
        group.append(part)
        size += part.size
    if group:
        yield group
