"""Safetensors files written tensor by tensor, in a fixed order, hashed on the way.

Format: 8 bytes little-endian length of the header, the header (JSON, padded with spaces), the tensors' bytes
(https://github.com/huggingface/safetensors#format). The library's own writer wants all tensors in memory.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from blake3 import blake3
from torch import Tensor

from megatron_joy.data.atomic import EarlyWriteback, commit_partial, partial_path

DTYPES: dict[str, tuple[str, torch.dtype]] = {
    "fp32": ("F32", torch.float32),
    "bf16": ("BF16", torch.bfloat16),
    "fp8": ("F8_E4M3", torch.float8_e4m3fn),
    "int8": ("I8", torch.int8),
    "int32": ("I32", torch.int32),
    "int64": ("I64", torch.int64),
}
_ALIGNMENT = 8
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Entry:
    """A tensor of a file. dtype: a key of DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its elements."""
        return math.prod(self.shape) * DTYPES[self.dtype][1].itemsize


def _header(entries: Sequence[Entry]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        content[entry.name] = {
            "dtype": DTYPES[entry.dtype][0],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.bytes],
        }
        end += entry.bytes
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name -> (dtype as the format calls it, shape, first byte in the file), of a file that the library has checked."""
    with open(path, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        content = json.loads(stream.read(length))
    content.pop("__metadata__", None)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in content.items()
    }


def aligned(entries: Sequence[Entry]) -> list[Entry]:
    """The order in a file: wide elements first, so that each tensor lies at a multiple of its elements' size."""
    return sorted(entries, key=lambda entry: -DTYPES[entry.dtype][1].itemsize)


def write_file(
    path: Path, entries: Sequence[Entry], produce: Callable[[Entry], Mapping[str, Iterable[Tensor]]]
) -> dict[str, str]:
    """Writes and syncs the tensors, laid out in the given order; returns the BLAKE3 of each one's bytes.

    `produce` is asked for the first tensor that is not there yet and gives it by name, as pieces of its rows one after
    the other, together of exactly the entry's shape and dtype (ValueError otherwise), with whatever others of the file
    came of the same work (a weight and its scales). The file appears under its name when it is whole.
    """
    digests: dict[str, str] = {}
    header = _header(entries)
    place: dict[str, tuple[Entry, int]] = {}
    end = len(header)
    for entry in entries:
        place[entry.name] = (entry, end)
        end += entry.bytes
    partial = partial_path(path)
    try:
        # Hashing takes about as long as writing, and neither needs the interpreter meanwhile.
        with open(partial, "wb", buffering=0) as stream, ThreadPoolExecutor(1) as hasher:
            _write_all(stream, header)
            begin_writeback = EarlyWriteback(stream.fileno())
            for entry in entries:
                if entry.name in digests:
                    continue
                for name, pieces in produce(entry).items():
                    stream.seek(place[name][1])
                    digests[name] = _write_tensor(stream, place[name][0], pieces, hasher, begin_writeback)
            os.fsync(stream.fileno())
        commit_partial(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return digests


def _write_all(stream: IO[bytes], data: bytes | memoryview) -> None:
    """An unbuffered file takes at most 2 GiB at a time."""
    left = memoryview(data)
    while left:
        left = left[stream.write(left) :]


def _write_tensor(
    stream: IO[bytes],
    entry: Entry,
    pieces: Iterable[Tensor],
    hasher: ThreadPoolExecutor,
    begin_writeback: EarlyWriteback,
) -> str:
    digest, written = blake3(), 0
    for tensor in pieces:
        if tensor.shape[1:] != entry.shape[1:] or tensor.dtype != DTYPES[entry.dtype][1]:
            raise ValueError(f"{entry.name}: {list(tensor.shape)} {tensor.dtype}, expected {entry}")
        data = elements_of(tensor)
        hashed = hasher.submit(digest.update, data)
        _write_all(stream, data)
        hashed.result()
        begin_writeback(data.nbytes)
        written += data.nbytes
    if written != entry.bytes:
        raise ValueError(f"{entry.name}: {written} bytes, expected {entry}")
    return digest.hexdigest()


def holds(path: Path, entries: Sequence[Entry], digests: Mapping[str, str]) -> bool:
    """Whether a file is, byte for byte, what `write_file` made of these entries when it returned these digests."""
    return file_problem(path, entries, digests) is None


def file_problem(path: Path, entries: Sequence[Entry], digests: Mapping[str, str]) -> str | None:
    """The tensor, or other part, whose bytes are not what `write_file` wrote when it returned these digests."""
    header = _header(entries)
    try:
        with open(path, "rb") as stream:
            if os.fstat(stream.fileno()).st_size != len(header) + sum(entry.bytes for entry in entries):
                return "its size"
            if stream.read(len(header)) != header:
                return "its header"
            for entry in entries:
                if _digest_of(stream, entry.bytes) != digests.get(entry.name):
                    return entry.name
    except OSError as error:
        return f"its content ({error.strerror})"
    return None


def _digest_of(stream: IO[bytes], size: int) -> str:
    digest = blake3()
    while size:
        data = stream.read(min(size, _CHUNK))
        digest.update(data)
        size -= len(data)
    return digest.hexdigest()


def elements_of(tensor: Tensor) -> memoryview:
    """The tensor's elements as bytes, row by row."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
