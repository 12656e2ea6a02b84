"""Which scale a group of values gets, and the values in FP8: Transformer Engine 2.20's rules, bit for bit.

Letters: r rows, c columns, E experts, n matrix rows (outputs), k matrix columns (inputs).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}

EXPONENT_BITS = 23
MANTISSA_MASK = (1 << EXPONENT_BITS) - 1


@dataclass(frozen=True)
class Scaling:
    """One recipe: which values share a scale, and which scales there are.

    tile: values along the contracted dimension that share a scale with nothing beside them; None: the whole tensor (of
        grouped experts, each expert's part of it).
    weight_rows: rows of a weight that share a scale with `tile` columns; None: the whole matrix.
    scales: "any" fp32 number; "power_down": its mantissa cut off; "e8m0": the inverse rounded up to a power of two.
    """

    tile: int | None
    weight_rows: int | None
    scales: Literal["any", "power_down", "e8m0"]


SCALINGS = {
    # Float8CurrentScaling
    "tensorwise": Scaling(tile=None, weight_rows=None, scales="any"),
    # Float8BlockScaling: 1 x 128 for activations and gradients, 128 x 128 for weights (DeepSeek-V3, section 3.3)
    "blockwise": Scaling(tile=128, weight_rows=128, scales="power_down"),
    # MXFP8BlockScaling: OCP Microscaling, 1 x 32 with E8M0 scales for everything
    "mxfp8": Scaling(tile=32, weight_rows=1, scales="e8m0"),
}


@dataclass(frozen=True)
class Quantized:
    """FP8 values and what each is to be multiplied by, of the values' shape (fp32)."""

    values: Tensor
    scale_inv: Tensor

    def dequantized(self) -> Tensor:
        """fp32 numbers of the values' shape."""
        return self.values.float() * self.scale_inv


def cast(x: Tensor, fp8: torch.dtype) -> Tensor:
    """Round to nearest even, saturating; torch before 2.13 overflows to NaN or infinity, hence the clamp."""
    return x.clamp(-LARGEST[fp8], LARGEST[fp8]).to(fp8)


def _power_of_two(biased: Tensor) -> Tensor:
    """2 ** (biased - 127) for int32 0..254; 2 ** -127 is the one fp32 number among them that is subnormal."""
    bits = torch.where(biased > 0, biased << EXPONENT_BITS, torch.full_like(biased, 1 << (EXPONENT_BITS - 1)))
    return bits.view(torch.float32)


def _e8m0(amax: Tensor, fp8: torch.dtype) -> tuple[Tensor, Tensor]:
    """amax over the format's largest value, rounded up to a power of two, as inverse scale; and the scale."""
    bits = (amax * torch.tensor(1.0 / LARGEST[fp8], dtype=torch.float32)).view(torch.int32)
    exponent, mantissa = bits >> EXPONENT_BITS, bits & MANTISSA_MASK
    # Of subnormal numbers those up to 2 ** -127 are rounded to it.
    up = (mantissa > 0) & (exponent != 254) & ~((exponent == 0) & (mantissa <= 1 << (EXPONENT_BITS - 1)))
    exponent = (exponent + up.int()).clamp(max=254)
    return _power_of_two(254 - exponent), _power_of_two(exponent)


def scale_of(amax: Tensor, fp8: torch.dtype, dtype: torch.dtype, scales: str) -> tuple[Tensor, Tensor]:
    """Scale and inverse scale of groups with largest magnitudes `amax` (fp32), for values of number format `dtype`.

    Source: Transformer Engine 2.20, recipe_common.cuh:14-48 (amax epsilon 0, its default); E8M0 as CUDA's
    cvt.rp.satfinite.ue8m0x2.f32.
    """
    if scales == "e8m0":
        return _e8m0(amax, fp8)
    # `448.0 / tensor` multiplies by a reciprocal in torch and is one unit in the last place off.
    scale = torch.full_like(amax, LARGEST[fp8]).div(amax)
    scale = torch.where(torch.isinf(scale), torch.finfo(dtype).max, scale)
    if scales == "power_down":
        scale = (scale.view(torch.int32) & ~MANTISSA_MASK).view(torch.float32)
    useless = (amax == 0) | ~torch.isfinite(amax)
    scale = torch.where(useless, torch.ones_like(scale), scale)
    return scale, scale.reciprocal()


def _limit(scaling: Scaling, x: Tensor) -> torch.dtype:
    """The format whose largest value stands in for an infinite scale: a tensor's in blocks, fp32 for a whole one."""
    return torch.float32 if scaling.tile is None else x.dtype


def _quantized(x: Tensor, amax: Tensor, fp8: torch.dtype, scaling: Scaling) -> tuple[Tensor, Tensor]:
    scale, inverse = scale_of(amax, fp8, _limit(scaling, x), scaling.scales)
    return cast(x.float() * scale, fp8), inverse.expand(x.shape)


def _along_columns(x: Tensor, fp8: torch.dtype, scaling: Scaling, tile: int) -> Quantized:
    width = x.shape[-1]
    tiles = F.pad(x, (0, -width % tile)).unflatten(-1, (-1, tile))  # [r, tiles, tile]
    values, inverse = _quantized(tiles, tiles.abs().amax(-1, keepdim=True).float(), fp8, scaling)
    return Quantized(values.flatten(-2)[..., :width], inverse.flatten(-2)[..., :width])


def tile_lengths(parts: Sequence[int], tile: int) -> list[int]:
    """Rows of each tile when every part is cut by itself: (130, 0, 5), 128 -> 128, 2, 5."""
    return [min(tile, part - start) for part in parts for start in range(0, part, tile)]


def _over_rows(x: Tensor, fp8: torch.dtype, scaling: Scaling, lengths: Sequence[int], whole: bool) -> Quantized:
    """Groups of consecutive rows; each column by itself, or all columns together."""
    counts = torch.tensor(lengths, device=x.device)
    amax = torch.segment_reduce(x.abs().float(), "max", lengths=counts, axis=0)  # [groups, c]
    if whole:
        amax = amax.amax(-1, keepdim=True)
    return Quantized(*_quantized(x, amax.repeat_interleave(counts, 0), fp8, scaling))


def quantize(x: Tensor, fp8: torch.dtype, scaling: Scaling, contracted: int, parts: Sequence[int]) -> Quantized:
    """An activation or a gradient [r, c] for a product over dimension `contracted` (0: rows, 1: columns).

    parts: rows of each expert, adding up to r (one number where there are no experts). Groups never cross them.
    """
    if x.shape[0] == 0:
        return Quantized(x.to(fp8), x.float())
    if scaling.tile is None:
        return _over_rows(x, fp8, scaling, [part for part in parts if part], whole=True)
    if contracted == 1:
        return _along_columns(x, fp8, scaling, scaling.tile)
    return _over_rows(x, fp8, scaling, tile_lengths(parts, scaling.tile), whole=False)


def quantize_weight(weight: Tensor, fp8: torch.dtype, scaling: Scaling, contracted: int) -> Quantized:
    """A weight [..., n, k], each matrix by itself, for a product over its dimension `contracted` (-2: n, -1: k)."""
    if scaling.tile is None or scaling.weight_rows is None:
        amax = weight.abs().amax((-2, -1), keepdim=True).float()
        return Quantized(*_quantized(weight, amax, fp8, scaling))
    if scaling.weight_rows == 1:
        if contracted == -1:
            return _along_columns(weight, fp8, scaling, scaling.tile)
        turned = _along_columns(weight.transpose(-2, -1), fp8, scaling, scaling.tile)
        return Quantized(turned.values.transpose(-2, -1), turned.scale_inv.transpose(-2, -1))
    return _blocks(weight, fp8, scaling, scaling.weight_rows, scaling.tile)


def _blocks(weight: Tensor, fp8: torch.dtype, scaling: Scaling, rows: int, columns: int) -> Quantized:
    n, k = weight.shape[-2:]
    padded = F.pad(weight, (0, -k % columns, 0, -n % rows))
    blocks = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # [..., n/rows, rows, k/columns, columns]
    values, inverse = _quantized(blocks, blocks.abs().amax((-3, -1), keepdim=True).float(), fp8, scaling)
    whole = [part.flatten(-4, -3).flatten(-2, -1)[..., :n, :k] for part in (values, inverse)]
    return Quantized(whole[0], whole[1])
