"""Any box of any tensor of a checkpoint, read from its files without a model, process groups or whole tensors.

torch.distributed.checkpoint keeps each chunk of a tensor as a small archive of torch.save inside a rank's file. Its
elements lie there uncompressed, so a box is read with `pread` from just the bytes that hold it. No archive is unpickled
freely: both the index and the archives' descriptions may name nothing but what tensors consist of.
"""

import io
import math
import os
import pickle
import struct
import zipfile
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_joy.checkpoint.marker import Checkpoint
from megatron_joy.checkpoint.storage import read_index
from megatron_joy.errors import WorkError

Shape = tuple[int, ...]
OPTIMIZER_PREFIX = "optimizer."
OPEN_FILES = 64
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a zip entry; the last two are the lengths of its name and extra field
_BROKEN = (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError, TypeError, EOFError, struct.error)
_LOCAL_MARK = b"PK\x03\x04"
_STORAGES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16}


@dataclass(frozen=True)
class _View:
    """What an archive says its tensor is: a view of one of its storages."""

    storage: str
    dtype: torch.dtype
    offset: int
    size: Shape
    stride: Shape


class _DescriptionUnpickler(pickle.Unpickler):
    """Reads an archive's description of a tensor as a `_View`; anything else in it is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *unused: _View(
                storage=storage[0], dtype=storage[1], offset=offset, size=tuple(size), stride=tuple(stride)
            )
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no tensor consists of")

    def persistent_load(self, reference: Any) -> tuple[str, torch.dtype]:
        _, dtype, key, *_ = reference
        return key, dtype


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self.descriptor, self.offset, self.length, self.position = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.length - self.position)
        wanted = left if size is None or size < 0 else min(size, left)
        data = os.pread(self.descriptor, wanted, self.offset + self.position)
        self.position += len(data)
        return data


@dataclass(frozen=True)
class _Chunk:
    """Where the elements of one chunk lie: row-major in a file from a byte on."""

    path: Path
    first_byte: int
    start: Shape
    size: Shape


def _strides(shape: Shape) -> Shape:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _row_by_row(view: _View) -> bool:
    """Whether its elements follow each other. The stride of a dimension of one element says nothing."""
    axes = zip(view.size, view.stride, _strides(view.size), strict=True)
    return all(stride == expected for size, stride, expected in axes if size > 1)


class _Rows:
    """The chunks of a tensor by their first dimension: of hundreds of experts a box is one's."""

    def __init__(self, chunks: Sequence[ChunkStorageMetadata]) -> None:
        self._chunks = sorted(chunks, key=lambda chunk: tuple(chunk.offsets))
        self._firsts = [chunk.offsets[0] if chunk.offsets else 0 for chunk in self._chunks]
        self._longest = max((chunk.sizes[0] for chunk in self._chunks if chunk.sizes), default=0)

    def meeting(self, low: Shape, high: Shape) -> list[ChunkStorageMetadata]:
        """All that meet the box [low, high), maybe some that don't."""
        if not low:
            return self._chunks
        first = bisect_right(self._firsts, low[0] - self._longest)
        return self._chunks[first : bisect_left(self._firsts, high[0])]


class TensorStore:
    """The weights of a checkpoint: `shapes` and `dtypes` by key, and boxes of them.

    Raises WorkError where a file is not what the checkpoint's index says.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._index = read_index(checkpoint)
        self._entries = {
            key: entry
            for key, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(OPTIMIZER_PREFIX)
        }
        self.shapes: dict[str, Shape] = {key: tuple(entry.size) for key, entry in self._entries.items()}
        self.dtypes = {key: entry.properties.dtype for key, entry in self._entries.items()}
        self._rows = {key: _Rows(entry.chunks) for key, entry in self._entries.items()}
        self._chunks: dict[tuple[str, Shape], _Chunk] = {}
        self._files: OrderedDict[Path, int] = OrderedDict()

    def __enter__(self) -> "TensorStore":
        return self

    def __exit__(self, *exc: object) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self, key: str, start: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """The box of `size` elements from `start` on (None: the whole tensor), in the stored dtype."""
        low = tuple(start or (0 for _ in self.shapes[key]))
        shape = tuple(size or self.shapes[key])
        high = tuple(a + n for a, n in zip(low, shape, strict=True))
        dtype, filled = self.dtypes[key], 0
        out: Tensor | None = None
        for entry in self._rows[key].meeting(low, high):
            inner_low = tuple(map(max, low, entry.offsets))
            inner_high = tuple(min(b, o + n) for b, o, n in zip(high, entry.offsets, entry.sizes, strict=True))
            if any(a >= b for a, b in zip(inner_low, inner_high, strict=True)):
                continue
            part = self._read_part(self._chunk(key, entry), inner_low, inner_high, dtype)
            if part.shape == shape:
                return part
            out = torch.empty(shape, dtype=dtype) if out is None else out
            target = out[tuple(slice(a - o, b - o) for a, b, o in zip(inner_low, inner_high, low, strict=True))]
            target.copy_(part)
            filled += target.numel()
        if out is None or filled != out.numel():
            raise WorkError(
                f"{self.checkpoint.path}: {filled} of {math.prod(shape)} elements of {key} at {list(low)} are there; "
                "take another checkpoint"
            )
        return out

    def _read_part(self, chunk: _Chunk, low: Shape, high: Shape, dtype: torch.dtype) -> Tensor:
        """The box [low, high) of the tensor, inside the chunk: one read from its first element to its last."""
        strides = _strides(chunk.size)
        first = sum((a - o) * s for a, o, s in zip(low, chunk.start, strides, strict=True))
        last = sum((b - 1 - o) * s for b, o, s in zip(high, chunk.start, strides, strict=True))
        count = last + 1 - first
        buffer = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        self._fill(chunk.path, chunk.first_byte + first * dtype.itemsize, memoryview(buffer.numpy()))
        size = tuple(b - a for a, b in zip(low, high, strict=True))
        return buffer.view(dtype).as_strided(size, strides)

    def _fill(self, path: Path, offset: int, target: memoryview) -> None:
        while target:
            done = os.preadv(self._open(path), [target], offset)
            if done == 0:
                raise WorkError(f"{path}: ends at byte {offset}, where a tensor goes on; take another checkpoint")
            target, offset = target[done:], offset + done

    def _open(self, path: Path) -> int:
        descriptor = self._files.pop(path, None)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._files[path] = descriptor
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def _chunk(self, key: str, entry: ChunkStorageMetadata) -> _Chunk:
        start = tuple(entry.offsets)
        if (key, start) not in self._chunks:
            self._chunks[key, start] = self._locate(key, start, tuple(entry.sizes))
        return self._chunks[key, start]

    def _locate(self, key: str, start: Shape, size: Shape) -> _Chunk:
        info = self._index.storage_data[MetadataIndex(key, start)]
        path = self.checkpoint.path / info.relative_path
        try:
            view, first_byte = _open_archive(_Window(self._open(path), info.offset, info.length))
        except _BROKEN as error:
            raise WorkError(f"{path}: the archive of {key} at {list(start)} can't be read: {error}") from None
        if view.dtype != self.dtypes[key] or view.size != size or not _row_by_row(view):
            raise WorkError(
                f"{path}: the archive of {key} at {list(start)} has {view.dtype} {list(view.size)}, expected "
                f"{self.dtypes[key]} {list(size)} row by row"
            )
        return _Chunk(path, info.offset + first_byte + view.offset * view.dtype.itemsize, start, size)


def _open_archive(window: _Window) -> tuple[_View, int]:
    """What tensor an archive has and the byte, from the archive's first, at which its storage begins."""
    with zipfile.ZipFile(window) as archive:
        (description,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        entry = archive.getinfo(description)
        window.seek(_first_byte(window, entry))
        view = _DescriptionUnpickler(io.BytesIO(window.read(entry.file_size))).load()
        if not isinstance(view, _View):
            raise ValueError("it does not describe a tensor")
        storage = archive.getinfo(f"{description.removesuffix('data.pkl')}data/{view.storage}")
    return view, _first_byte(window, storage)


def _first_byte(window: _Window, entry: zipfile.ZipInfo) -> int:
    """Where an entry's content begins. Archives of a checkpoint have no CRC-32 (`storage.HashingFileSystem`)."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed")
    window.seek(entry.header_offset)
    mark, *_, name_length, extra_length = _LOCAL_HEADER.unpack(window.read(_LOCAL_HEADER.size))
    if mark != _LOCAL_MARK:
        raise ValueError("its directory points to no entry")
    return entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
