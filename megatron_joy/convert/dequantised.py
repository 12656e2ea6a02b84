"""A folder of quantised weights as the folder of bf16 weights that it stands for, dequantised as they are read."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_joy.convert.hf_config import CONFIG
from megatron_joy.convert.hf_folder import HFFolder
from megatron_joy.convert.precisions.config import KEY, scheme_of
from megatron_joy.convert.precisions.schemes import Scheme
from megatron_joy.convert.safetensors_file import DTYPES
from megatron_joy.errors import UserError


def open_folder(path: Path, config: dict[str, Any]) -> HFFolder:
    """The folder's weights, dequantised where its config.json says that they are quantised. Raises UserError."""
    quantised = config.get(KEY)
    if not quantised:
        return HFFolder(path)
    if not isinstance(quantised, dict):
        raise UserError(f"{path / CONFIG}: {KEY} is {quantised!r}; expected a table")
    return DequantisedFolder(path, scheme_of(quantised, path / CONFIG))


class DequantisedFolder(HFFolder):
    """Names, shapes and dtypes are those of the weights; a weight is put together from what is stored of it.

    Raises UserError where a weight has no scale, a scale no weight, or one is of another shape than the weight's.
    """

    def __init__(self, folder: Path, scheme: Scheme) -> None:
        super().__init__(folder, quantised=True)
        self.scheme = scheme
        self.stored: dict[str, dict[str, str]] = {}  # weight -> suffix -> stored name
        ending = f".{scheme.scale}"
        for name in [name for name in self.shapes if name.endswith(ending)]:
            self._join(name.removesuffix(scheme.scale))
        if not self.stored:
            raise UserError(
                f"{folder / CONFIG}: {KEY} says that weights are quantised, no tensor has a {scheme.scale}; "
                f"take the config.json of these files, without {KEY} if they are not quantised"
            )
        for name, dtype in self.dtypes.items():
            if dtype not in (torch.float32, torch.bfloat16):
                what = str(dtype).removeprefix("torch.")
                raise UserError(f"{folder / self.file_of[name]}: {name} is {what} and has no {scheme.scale}")

    def _join(self, stem: str) -> None:
        """Takes a weight's parts out of the names and puts the weight there."""
        weight = stem + "weight"
        shape = self._shape_of(stem)
        keys = {}
        for part in self.scheme.parts(shape):
            key = stem + part.suffix
            found = (self.shapes.get(key), self.dtypes.get(key))
            # A scale may be kept in more bits than we would write.
            dtype_fits = found[1] == DTYPES[part.dtype][1] or (
                part.suffix == self.scheme.scale and found[1] in (torch.float32, torch.bfloat16)
            )
            if found[0] != part.shape or not dtype_fits:
                told = "not there" if found[0] is None else f"{found[1]} {list(found[0])}"
                where = self.folder / self.file_of[stem + self.scheme.scale]
                raise UserError(f"{where}: {key} is {told}, expected {part.dtype} {list(part.shape)}")
            keys[part.suffix] = key
        file = self.file_of[keys[self.scheme.scale]]
        for key in keys.values():
            del self.shapes[key], self.dtypes[key]
        self.stored[weight] = keys
        self.shapes[weight], self.dtypes[weight], self.file_of[weight] = shape, torch.bfloat16, file

    def _shape_of(self, stem: str) -> tuple[int, ...]:
        """The weight's own shape; where it is packed, as stored beside it."""
        if f"{stem}weight_shape" in self.shapes:
            rows, columns = map(int, super().read(f"{stem}weight_shape"))
            return rows, columns
        shape = self.shapes.get(f"{stem}weight", ())
        if len(shape) != 2:
            where = self.folder / self.file_of[stem + self.scheme.scale]
            raise UserError(f"{where}: {stem}{self.scheme.scale} has no matrix {stem}weight beside it")
        return shape

    def read(self, name: str) -> Tensor:
        """A tensor: bf16 where it was quantised, else as it is stored."""
        if name not in self.stored:
            return super().read(name)
        stored = {suffix: self._read_rows(key, 0, None) for suffix, key in self.stored[name].items()}
        return self.scheme.dequantise(stored).bfloat16()

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows of what `read` gives."""
        return self.read(name)[first : first + count] if name in self.stored else super().rows(name, first, count)
