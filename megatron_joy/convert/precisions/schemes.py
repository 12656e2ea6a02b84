"""How a matrix is stored in few bits: one scale for each tile, values rounded to the nearest.

A tile is a rectangle of a weight [out, in] whose elements share a scale. A scale is the tile's largest magnitude over
the format's largest value, in the number format in which it is stored, so what was divided by is what engines multiply
with. Sources: DeepSeek-V3 (arXiv 2412.19437, section 3.3) for blocks of 128 x 128; the layouts of stored tensors are
those that vLLM, SGLang and compressed-tensors read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]
Tile = tuple[int, int]  # rows, columns; 0 columns: the whole row

E4M3_LARGEST = 448.0
E4M3_HALF_STEP = 2.0**-4  # of the value: three bits of mantissa
E4M3_SMALLEST_HALF_STEP = 2.0**-10  # of the scale: subnormal numbers are 2^-9 apart
INT8_LARGEST = 127.0
INT4_LOW, INT4_HIGH, INT4_LARGEST = -8, 7, 7.5
_ROWS = 256
NIBBLES = 8  # int4 numbers in an int32, the first in its lowest bits


@dataclass(frozen=True)
class Part:
    """A tensor that is stored for a weight; `suffix` stands in place of the name's last part, 'weight'."""

    suffix: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Scheme:
    """A way to store a weight [out, in]. quantise takes bf16 or fp32 and gives the parts by suffix; dequantise fp32.

    half_step: the largest error of one value [..] under its scale, elementwise.
    """

    name: str
    tile: Tile
    parts: Callable[[Shape], tuple[Part, ...]]
    quantise: Callable[[Tensor], dict[str, Tensor]]
    dequantise: Callable[[Mapping[str, Tensor]], Tensor]
    half_step: Callable[[Tensor, Tensor], Tensor]
    scale: str  # the suffix of the scales


def grid(shape: Shape, tile: Tile) -> Shape:
    """How many tiles a matrix has, the last ones maybe cut short."""
    rows, columns = tile[0], tile[1] or shape[1]
    return (-(-shape[0] // rows), -(-shape[1] // columns))


def tiled(matrix: Tensor, tile: Tile) -> Tensor:
    """[r, c] -> [R, tile rows, C, tile columns], zeros where the last tiles are cut short."""
    shape = tuple(matrix.shape)
    count, rows, columns = grid(shape, tile), tile[0], tile[1] or shape[1]
    missing = (count[0] * rows - shape[0], count[1] * columns - shape[1])
    if any(missing):
        matrix = F.pad(matrix, (0, missing[1], 0, missing[0]))
    return matrix.reshape(count[0], rows, count[1], columns)


def untiled(tiles: Tensor, shape: Shape) -> Tensor:
    """The inverse of `tiled`."""
    whole = tiles.reshape(tiles.shape[0] * tiles.shape[1], -1)
    return whole[: shape[0], : shape[1]].contiguous()


def spread(scales: Tensor, shape: Shape, tile: Tile) -> Tensor:
    """Scales [R, C] -> the scale of each element [r, c]."""
    columns = tile[1] or shape[1]
    return scales.repeat_interleave(tile[0], 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]


def _largest(tiles: Tensor) -> Tensor:
    """[R, tile rows, C, tile columns] -> the largest magnitude of each tile [R, C]. ValueError for NaN and infinity."""
    found = torch.maximum(tiles.amax(3).amax(1), -tiles.amin(3).amin(1))
    if not torch.isfinite(found).all():
        raise ValueError("has values that are infinite or no numbers")
    return found


def _scales(largest: Tensor, top: float) -> Tensor:
    """fp32; 1 for a tile of zeros."""
    return torch.where(largest > 0, largest / top, 1.0).clamp_min(torch.finfo(torch.float32).tiny)


def _bf16_not_below(scales: Tensor) -> Tensor:
    """Rounded up, so that no value falls outside the range of the numbers it is stored in."""
    nearest = scales.bfloat16()
    up = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    return torch.where(nearest.float() < scales, up, nearest)


def _rounded(tiles: Tensor, scales: Tensor, low: float, high: float) -> Tensor:
    """tiles / scales, to the nearest whole number (ties to even), as int8."""
    return (tiles / scales[:, None, :, None]).round_().clamp_(low, high).to(torch.int8)


def _by_rows(weight: Tensor, tile: Tile, rounded: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(values, scales) of a weight, worked out for some whole tiles of rows at a time in fp32.

    What is in between fits into a processor's cache and into memory that the last rows had: a third of the time less.
    """
    parts = [rounded(rows.float()) for rows in weight.split(tile[0] * max(1, _ROWS // tile[0]))]
    values, scales = (torch.cat([part[i].view(torch.uint8) for part in parts]).view(parts[0][i].dtype) for i in (0, 1))
    return values, scales


def _half_of_the_scale(weight: Tensor, scales: Tensor) -> Tensor:
    return 0.5 * scales


def fp8_blocks(tile: Tile = (128, 128)) -> Scheme:
    """E4M3 values and an fp32 scale for each block, `weight_scale_inv` (what to multiply with), as DeepSeek-V3 has."""

    def parts(shape: Shape) -> tuple[Part, ...]:
        return Part("weight", "fp8", shape), Part("weight_scale_inv", "fp32", grid(shape, tile))

    def quantise(weight: Tensor) -> dict[str, Tensor]:
        values, scales = _by_rows(weight, tile, rounded)
        return {"weight": values, "weight_scale_inv": scales}

    def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
        tiles = tiled(rows, tile)
        scales = _scales(_largest(tiles), E4M3_LARGEST)
        # No value is above the largest by more than its rounding, which the cast takes back: nothing to clamp.
        values = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        return untiled(values, tuple(rows.shape)), scales

    def half_step(weight: Tensor, scales: Tensor) -> Tensor:
        return torch.maximum(weight.abs() * E4M3_HALF_STEP, scales * E4M3_SMALLEST_HALF_STEP)

    return Scheme(
        "fp8-block", tile, parts, quantise, _multiplied("weight_scale_inv", tile), half_step, "weight_scale_inv"
    )


def _multiplied(scale: str, tile: Tile) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def dequantise(stored: Mapping[str, Tensor]) -> Tensor:
        values = stored["weight"].float()
        return untiled(tiled(values, tile) * stored[scale].float()[:, None, :, None], tuple(values.shape))

    return dequantise


def int8_tiles(name: str, tile: Tile, scale: str) -> Scheme:
    """int8 values from -127 to 127 and an fp32 scale for each tile under the suffix `scale`."""

    def parts(shape: Shape) -> tuple[Part, ...]:
        return Part("weight", "int8", shape), Part(scale, "fp32", grid(shape, tile))

    def quantise(weight: Tensor) -> dict[str, Tensor]:
        values, scales = _by_rows(weight, tile, rounded)
        return {"weight": values, scale: scales}

    def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
        tiles = tiled(rows, tile)
        scales = _scales(_largest(tiles), INT8_LARGEST)
        return untiled(_rounded(tiles, scales, -INT8_LARGEST, INT8_LARGEST), tuple(rows.shape)), scales

    return Scheme(name, tile, parts, quantise, _multiplied(scale, tile), _half_of_the_scale, scale)


def int4_groups(group: int) -> Scheme:
    """int4 values from -8 to 7, eight to an int32, and a bf16 scale for each `group` inputs of an output."""
    tile = (1, group)

    def parts(shape: Shape) -> tuple[Part, ...]:
        return (
            Part("weight_packed", "int32", (shape[0], shape[1] // NIBBLES)),
            Part("weight_scale", "bf16", grid(shape, tile)),
            Part("weight_shape", "int64", (2,)),
        )

    def quantise(weight: Tensor) -> dict[str, Tensor]:
        tiles = tiled(weight.float(), tile)
        scales = _bf16_not_below(_scales(_largest(tiles), INT4_LARGEST))
        values = untiled(_rounded(tiles, scales.float(), INT4_LOW, INT4_HIGH), tuple(weight.shape))
        shape = torch.tensor(weight.shape, dtype=torch.int64)
        return {"weight_packed": pack_nibbles(values), "weight_scale": scales, "weight_shape": shape}

    def dequantise(stored: Mapping[str, Tensor]) -> Tensor:
        values = unpack_nibbles(stored["weight_packed"]).float()
        scales = stored["weight_scale"].float()
        return untiled(tiled(values, tile) * scales[:, None, :, None], tuple(values.shape))

    return Scheme(f"int4-group-{group}", tile, parts, quantise, dequantise, _half_of_the_scale, "weight_scale")


def pack_nibbles(values: Tensor) -> Tensor:
    """int8 [r, c] from -8 to 7 -> int32 [r, c / 8]; each is stored plus 8, the first in the lowest bits."""
    raised = (values - INT4_LOW).to(torch.uint8)  # [r, c], 0 to 15
    return (raised[:, 0::2] | (raised[:, 1::2] << 4)).contiguous().view(torch.int32)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    pairs = packed.contiguous().view(torch.uint8)  # [r, c / 2]
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1).to(torch.int8) + INT4_LOW
