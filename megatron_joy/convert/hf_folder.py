"""The tensors of a Hugging Face folder: what is there according to the files themselves, checked against the index."""

import json
import math
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_joy.convert.safetensors_file import read_header
from megatron_joy.errors import UserError, WorkError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
QUANTISED = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
OPEN_FILES = 8
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class HFFolder:
    """`shapes` and `dtypes` of every tensor by name, and the tensors, read one at a time.

    Only safetensors are read, and no code of the folder is run. Raises UserError, in one line, for what is wrong: no
    safetensors, a file that is absent, cut short or not safetensors, an index that disagrees with the files, a dtype
    other than F32 and BF16 (`quantised`: and those that quantised weights are stored in).
    """

    def __init__(self, folder: Path, quantised: bool = False) -> None:
        self.folder = folder
        self._known = DTYPES | (QUANTISED if quantised else {})
        self.file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._stored: dict[str, tuple[tuple[int, ...], torch.dtype, int]] = {}  # shape, dtype, first byte
        self._open: OrderedDict[str, int] = OrderedDict()
        index = self._read_index()
        names = sorted(set(index.values())) if index is not None else self._unindexed()
        for name in names:
            self._survey(name)
        for tensor, name in (index or {}).items():
            if self.file_of.get(tensor) != name:
                where = self.file_of.get(tensor, "no file")
                raise UserError(f"{folder / INDEX}: says that {tensor} is in {name}, it is in {where}; mend the index")
        if index is not None and (extra := sorted(self.file_of.keys() - index.keys())):
            raise UserError(f"{folder / INDEX}: lacks {extra[0]}, which is in {self.file_of[extra[0]]}; mend the index")

    def _read_index(self) -> dict[str, str] | None:
        path = self.folder / INDEX
        if not path.is_file():
            return None
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            index = {str(tensor): str(name) for tensor, name in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not an index of tensors ({error!r}); get the folder again") from None
        for name in index.values():
            if not _PLAIN_NAME.fullmatch(name):
                raise UserError(f"{path}: names the file {name!r}; expected a .safetensors file beside the index")
        return index

    def _unindexed(self) -> list[str]:
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        pickles = [path.name for pattern in _PICKLES for path in self.folder.glob(pattern)]
        told = f", only {pickles[0]}, a pickle, which is never opened" if pickles else ""
        raise UserError(f"{self.folder}: neither {INDEX} nor {SINGLE} is there{told}; expected safetensors files")

    def _survey(self, name: str) -> None:
        path = self.folder / name
        try:
            # The library checks the whole header; the tensors are read by us, piece by piece and without a map.
            with safe_open(path, framework="pt") as stream:
                listed = stream.keys()
            places = read_header(path)
        except FileNotFoundError:
            raise UserError(f"{path}: not there, though {INDEX} names it; get the folder again") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}); get it again") from None
        for tensor in listed:
            if tensor in self.file_of:
                raise UserError(f"{path}: has {tensor}, which {self.file_of[tensor]} has too; remove one")
            dtype, shape, first_byte = places[tensor]
            if dtype not in self._known:
                raise UserError(f"{path}: {tensor} is {dtype}; expected {' or '.join(self._known)}")
            self.file_of[tensor] = name
            self.shapes[tensor], self.dtypes[tensor] = shape, self._known[dtype]
            self._stored[tensor] = (shape, self._known[dtype], first_byte)

    def _descriptor(self, name: str) -> int:
        descriptor = self._open.pop(name, None)
        if descriptor is None:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        self._open[name] = descriptor
        if len(self._open) > OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return self._read_rows(name, 0, None)

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """`count` of a tensor's rows from `first` on, as they are stored."""
        return self._read_rows(name, first, count)

    def _read_rows(self, name: str, first: int, count: int | None) -> Tensor:
        shape, dtype, offset = self._stored[name]
        if count is not None:
            offset += first * math.prod(shape[1:]) * dtype.itemsize
            shape = (count, *shape[1:])
        buffer = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        target, file = memoryview(buffer.numpy()), self.file_of[name]
        while target:
            done = os.preadv(self._descriptor(file), [target], offset)
            if done == 0:
                raise WorkError(f"{self.folder / file}: ends inside {name}; it was whole before, get it again")
            target, offset = target[done:], offset + done
        return buffer.view(dtype).view(shape)


def only_dtype(dtypes: Mapping[str, torch.dtype], names: list[str], where: Path) -> torch.dtype:
    """The one dtype of these tensors. Raises UserError when there are several."""
    found = {dtypes[name]: name for name in names}
    if len(found) > 1:
        pairs = sorted((name, str(dtype).removeprefix("torch.")) for dtype, name in found.items())
        listed = ", ".join(f"{name} is {dtype}" for name, dtype in pairs)
        raise UserError(f"{where}: weights of several dtypes ({listed}); expected one")
    return next(iter(found))
