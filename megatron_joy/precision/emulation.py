"""Matrix products whose operands are rounded to FP8 under a scaling recipe: forward, dgrad and wgrad, on any machine.

Products of the dequantised operands are taken in fp32: the numbers that tensor cores multiply, with fp32 sums. What a
GPU's kernels add up in another order is the only difference.
Letters: t tokens, n outputs, k inputs, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_joy.precision.delayed import DelayedScales, History
from megatron_joy.precision.scaling import E4M3, E5M2, LARGEST, SCALINGS, Scaling, cast, quantize, quantize_weight

GRADIENT_FORMATS = {"e4m3": E4M3, "hybrid": E5M2}


@dataclass(frozen=True)
class Emulation:
    """A scaling recipe (`scaling`: a key of SCALINGS, or "delayed") and the gradients' format (of GRADIENT_FORMATS).

    history: with delayed scaling only.
    """

    scaling: str
    format: str
    history: History | None = None

    @property
    def rules(self) -> Scaling:
        """Which values share a scale."""
        return SCALINGS[self.scaling]

    @property
    def gradients(self) -> torch.dtype:
        """Number format of gradients; activations and weights are E4M3."""
        return GRADIENT_FORMATS[self.format]

    def largest(self, forward: bool) -> float:
        """Largest value of activations and weights, or of gradients."""
        return LARGEST[E4M3 if forward else self.gradients]


class _Product(torch.autograd.Function):
    """x [t, k], weight [n, k] or [E, n, k] -> [t, n]; `ends` [E] are the experts' last rows plus one, or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor | None, emulation: Emulation) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.emulation = emulation
        left = quantize(x, E4M3, emulation.rules, 1, _parts(x, ends)).dequantized()
        right = quantize_weight(weight, E4M3, emulation.rules, -1).dequantized()
        return _multiply(left, right.transpose(-2, -1), ends).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, ends = ctx.saved_tensors
        emulation, parts = ctx.emulation, _parts(x, ends)
        rules, fp8 = emulation.rules, emulation.gradients
        grad = grads[0].contiguous()
        # dgrad contracts over outputs, wgrad over tokens: operands are rounded afresh along the contracted dimension.
        over_outputs = quantize(grad, fp8, rules, 1, parts).dequantized()
        turned = quantize_weight(weight, E4M3, rules, -2).dequantized()
        grad_x = _multiply(over_outputs, turned, ends).to(x.dtype)
        over_tokens = quantize(grad, fp8, rules, 0, parts).dequantized()
        tokens = quantize(x, E4M3, rules, 0, parts).dequantized()
        return grad_x, _multiply(over_tokens.t(), tokens, ends).to(weight.dtype), None, None


def _parts(x: Tensor, ends: Tensor | None) -> list[int]:
    if ends is None:
        return [x.shape[0]]
    return torch.diff(ends, prepend=ends.new_zeros(1)).tolist()


def _multiply(left: Tensor, right: Tensor, ends: Tensor | None) -> Tensor:
    return left @ right if ends is None else F.grouped_mm(left, right, offs=ends)


class _DelayedProduct(torch.autograd.Function):
    """As _Product, under scales that are known before the tensors are: x's [t, 1], the weight's [1] or [E, 1, 1].

    A tensor is rounded once, for both products that it is in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        ends: Tensor | None,
        of_x: Tensor,
        of_weight: Tensor,
        emulation: Emulation,
        scales: DelayedScales,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, ends, of_x, of_weight)
        ctx.emulation, ctx.scales = emulation, scales
        left, right = _rounded(x, of_x, E4M3), _rounded(weight, of_weight, E4M3)
        return _multiply(left, right.transpose(-2, -1), ends).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends, of_x, of_weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        of_grad = ctx.scales.of_gradient(grad, _parts(x, ends))
        rounded = _rounded(grad, of_grad, ctx.emulation.gradients)
        grad_x = _multiply(rounded, _rounded(weight, of_weight, E4M3), ends).to(x.dtype)
        grad_weight = _multiply(rounded.t(), _rounded(x, of_x, E4M3), ends).to(weight.dtype)
        return grad_x, grad_weight, None, None, None, None, None


def _rounded(x: Tensor, scale: Tensor, fp8: torch.dtype) -> Tensor:
    return cast(x.float() * scale, fp8).float() * scale.reciprocal()


def _product(
    x: Tensor, weight: Tensor, ends: Tensor | None, emulation: Emulation, scales: DelayedScales | None
) -> Tensor:
    if scales is None:
        return _Product.apply(x, weight, ends, emulation)
    of_x, of_weight = scales.of_input(x, _parts(x, ends)), scales.of_weight(weight)
    return _DelayedProduct.apply(x, weight, ends, of_x, of_weight, emulation, scales)


def fp8_linear(x: Tensor, weight: Tensor, emulation: Emulation, scales: DelayedScales | None = None) -> Tensor:
    """x [..., k], weight [n, k] -> [..., n] in x's format; `scales`: this product's, with delayed scaling."""
    return _product(x.flatten(0, -2), weight, None, emulation, scales).unflatten(0, x.shape[:-1])


def fp8_grouped(
    x: Tensor, weight: Tensor, ends: Tensor, emulation: Emulation, scales: DelayedScales | None = None
) -> Tensor:
    """x [t, k] sorted by expert, weight [E, n, k], ends int32 [E] -> [t, n] in x's format; `scales`: as above."""
    return _product(x, weight, ends, emulation, scales)
