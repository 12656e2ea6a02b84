"""The tensors of a Hugging Face folder: what is there according to the files themselves, checked against the index."""

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_joy.errors import UserError

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
        self._open: OrderedDict[str, Any] = OrderedDict()
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
        stream = self._file(name)
        for tensor in stream.keys():  # noqa: SIM118 - not a dictionary
            if tensor in self.file_of:
                raise UserError(f"{self.folder / name}: has {tensor}, which {self.file_of[tensor]} has too; remove one")
            view = stream.get_slice(tensor)
            dtype = view.get_dtype()
            if dtype not in self._known:
                raise UserError(f"{self.folder / name}: {tensor} is {dtype}; expected {' or '.join(self._known)}")
            self.file_of[tensor] = name
            self.shapes[tensor] = tuple(view.get_shape())
            self.dtypes[tensor] = self._known[dtype]

    def _file(self, name: str) -> Any:
        stream = self._open.pop(name, None)
        if stream is None:
            path = self.folder / name
            try:
                stream = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise UserError(f"{path}: not there, though {INDEX} names it; get the folder again") from None
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error}); get it again") from None
        self._open[name] = stream
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)
        return stream

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        tensor: Tensor = self._file(self.file_of[name]).get_tensor(name)
        return tensor


def only_dtype(dtypes: Mapping[str, torch.dtype], names: list[str], where: Path) -> torch.dtype:
    """The one dtype of these tensors. Raises UserError when there are several."""
    found = {dtypes[name]: name for name in names}
    if len(found) > 1:
        pairs = sorted((name, str(dtype).removeprefix("torch.")) for dtype, name in found.items())
        listed = ", ".join(f"{name} is {dtype}" for name, dtype in pairs)
        raise UserError(f"{where}: weights of several dtypes ({listed}); expected one")
    return next(iter(found))
