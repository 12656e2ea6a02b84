"""Delayed scaling: a tensor's scale follows from the largest magnitudes of the tensors before it.

Rules of Transformer Engine 2.20 (delayed_scaling.cu:75-160, quantization.py `reduce_and_update_fp8_tensors`), bit for
bit. A product has a scale for its input, its weight and (never used) its output, and backward for the gradient of its
output and (never used) of its input; of grouped experts each has its own. State has Transformer Engine's form, so that
a checkpoint of either serves the other.

Letters: l length of the history, n scales, t rows, E experts.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

INPUT, WEIGHT, FORWARD_KINDS = 0, 1, 3
GRADIENT, BACKWARD_KINDS = 0, 2


@dataclass(frozen=True)
class History:
    """Of how many amaxes (`length`) a scale follows, from which of them, and how many powers of two below the most."""

    length: int
    algorithm: Literal["max", "most_recent"]
    margin: int


class State(NamedTuple):
    """scale [n]; amaxes [l, n], whose first row is of the tensors since the last update. Both fp32."""

    scale: Tensor
    amaxes: Tensor


def largest_of(x: Tensor) -> Tensor:
    """The largest magnitude, as CUDA's fmaxf finds it: a NaN is none, no elements have 0."""
    return (
        x.detach().abs().float().nan_to_num(nan=0.0, posinf=torch.inf).max() if x.numel() else x.new_zeros(()).float()
    )


def updated(state: State, largest: float, history: History) -> State:
    """What follows from a state whose first row of amaxes is complete, for a format with this `largest` value.

    The history moves on by one and its first row is empty again. An amax of 0 or infinity keeps the scale.
    """
    rolled = state.amaxes.roll(-1, 0)  # the newest is last now
    amax = rolled[-1] if history.algorithm == "most_recent" else rolled.amax(0)
    scale = torch.full_like(amax, largest * 2.0**-history.margin).div(amax)
    scale = torch.where(torch.isfinite(amax) & (amax > 0), scale, state.scale)
    scale = torch.where(torch.isinf(scale), torch.finfo(torch.float32).max, scale)
    rolled[0] = 0
    return State(scale, rolled)


class DelayedScales(torch.nn.Module):
    """State of one product, or of E experts' products: column `kind + expert * kinds`.

    A weight keeps for a step the scale that it was first rounded with, and only then is looked at: Transformer Engine
    rounds it in the step's first micro-batch. Not part of a model's state dict.
    """

    def __init__(self, history: History, experts: int = 1) -> None:
        super().__init__()
        for name, kinds in (("forward", FORWARD_KINDS), ("backward", BACKWARD_KINDS)):
            columns = experts * kinds
            self.register_buffer(f"scale_{name}", torch.ones(columns), persistent=False)
            self.register_buffer(f"amaxes_{name}", torch.zeros(history.length, columns), persistent=False)
        self.register_buffer("weight_scale", torch.ones(experts), persistent=False)
        self.first_micro_batch = True

    @property
    def forward_state(self) -> State:
        """Of inputs, weights, outputs."""
        return State(self.scale_forward, self.amaxes_forward)  # type: ignore[arg-type]

    @property
    def backward_state(self) -> State:
        """Of gradients."""
        return State(self.scale_backward, self.amaxes_backward)  # type: ignore[arg-type]

    def of_input(self, x: Tensor, parts: list[int]) -> Tensor:
        """Scale of each row of x [t, k], [t, 1]; x's amaxes are noted where there will be a backward pass."""
        return _scales(self.forward_state, INPUT, FORWARD_KINDS, x, parts, torch.is_grad_enabled())

    def of_weight(self, weight: Tensor) -> Tensor:
        """Scale of each matrix of weight [..., n, k], to be multiplied with it."""
        if self.first_micro_batch:
            self.first_micro_batch = False
            state = self.forward_state
            self.weight_scale.copy_(state.scale[WEIGHT::FORWARD_KINDS])  # type: ignore[operator]
            if torch.is_grad_enabled():
                matrices = weight if weight.dim() == 3 else [weight]
                _note(state.amaxes[0, WEIGHT::FORWARD_KINDS], [largest_of(matrix) for matrix in matrices])
        scale: Tensor = self.weight_scale.clone()  # type: ignore[operator]
        return scale[:, None, None] if weight.dim() == 3 else scale

    def of_gradient(self, grad: Tensor, parts: list[int]) -> Tensor:
        """Scale of each row of a gradient [t, n], [t, 1]; its amaxes are noted."""
        return _scales(self.backward_state, GRADIENT, BACKWARD_KINDS, grad, parts, True)


def _note(amaxes: Tensor, found: list[Tensor]) -> None:
    """Raises the newest amaxes [E] to those found."""
    amaxes.copy_(torch.maximum(amaxes, torch.stack(found)))


def _scales(state: State, kind: int, kinds: int, x: Tensor, parts: list[int], note: bool) -> Tensor:
    scales = state.scale[kind::kinds]
    rows = scales.repeat_interleave(torch.tensor(parts, device=x.device)).unsqueeze(-1)
    if note:
        _note(state.amaxes[0, kind::kinds], [largest_of(part) for part in x.split(parts)])
    return rows
