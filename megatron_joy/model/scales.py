"""Delayed FP8 scales of a rank's model: where they are, when they move on, and how a pass leaves no trace in them.

Transformer Engine moves them on at the end of each FP8 context that is the outermost (forward), and when the backward
pass has come back to its beginning; always all of a rank's at once, over all ranks that share its pipeline stage
(Megatron-core's `get_amax_reduction_group`). Megatron-core opens such contexts around each stack of layers and around
the MTP layer's projection, so these are the places where the emulation moves its scales on. With Transformer Engine
nothing is done here but looking after its state.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_joy.model.backends.select import emulation_of
from megatron_joy.precision.delayed import DelayedScales, State, updated
from megatron_joy.recipe.schema import Recipe

FORWARD, BACKWARD = "forward", "backward"
PROJECTION = "eh_proj"  # of the MTP layer


@dataclass(frozen=True)
class ProductState:
    """State of a product, or of a group's: `weight` is the (first) parameter that it multiplies with.

    by_direction: FORWARD, BACKWARD -> what moves on there.
    """

    weight: Tensor
    experts: int
    by_direction: dict[str, State]


def states_of(model: torch.nn.Module) -> Iterator[ProductState]:
    """Of every product of a model with delayed scaling, in the model's order; nothing under other scalings.

    Transformer Engine's modules have theirs after `ScaleKeeper` made them, or their first pass.
    """
    for module in model.modules():
        for name, scales in getattr(module, "fp8_scales", {}).items():
            weight = getattr(module, name)
            states = {FORWARD: scales.forward_state, BACKWARD: scales.backward_state}
            yield ProductState(weight, len(weight) if weight.dim() == 3 else 1, states)
        meta = getattr(module, "fp8_meta", {})
        if hasattr(meta.get("scaling_fwd"), "amax_history"):
            weight = getattr(module, "weight", None)
            pairs = ((FORWARD, meta["scaling_fwd"]), (BACKWARD, meta["scaling_bwd"]))
            states = {direction: State(state.scale, state.amax_history) for direction, state in pairs}
            yield ProductState(module.weight0 if weight is None else weight, meta["num_gemms"], states)  # type: ignore[arg-type]


def _make_states(chunk: Any) -> None:
    """Makes Transformer Engine's state, as its `set_extra_state` does, which else the first forward pass makes."""
    recipe = get_fp8_recipe(chunk.config)
    for module in chunk.modules():
        with_weight = hasattr(module, "weight") or hasattr(module, "weight0")
        if with_weight and hasattr(module, "init_fp8_meta_tensors") and not getattr(module, "outside_fp8", False):
            module.fp8_meta |= {"num_gemms": getattr(module, "num_gemms", 1), "recipe": recipe}
            module.init_fp8_meta_tensors(recipe)


class ScaleKeeper:
    """All of a rank's delayed scales; keeps nothing where a recipe has none."""

    def __init__(self, recipe: Recipe, groups: ProcessGroupCollection, chunks: Sequence[torch.nn.Module]) -> None:
        fp8 = recipe.precision.fp8
        self.chunks = chunks if fp8.recipe == "delayed" else ()
        self.group = groups.tp_dp_cp
        self._own: list[DelayedScales] = []
        if self.chunks and fp8.emulate:
            self.emulation = emulation_of(fp8)
            self._own = [m for chunk in chunks for m in chunk.modules() if isinstance(m, DelayedScales)]
        for chunk in self.chunks:
            if fp8.emulate:
                self._watch(chunk)
            else:
                _make_states(chunk)

    def _watch(self, chunk: torch.nn.Module) -> None:
        for name, module in chunk.named_modules():
            if isinstance(module, HybridStack) or name.endswith(PROJECTION):
                module.register_forward_pre_hook(self._enter, with_kwargs=True)
                module.register_forward_hook(self._leave)

    def begin(self) -> None:
        """A step's, or a validation's, first micro-batch comes next: weights are new."""
        for scales in self._own:
            scales.first_micro_batch = True

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if not torch.is_grad_enabled():
            return None
        if isinstance(module, HybridStack) and not module.pre_process:
            module.input_tensor = _ComesBack.apply(module.input_tensor, self)  # another stage's output
            return None
        if args:
            return (_ComesBack.apply(args[0], self), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, kwargs | {name: _ComesBack.apply(kwargs[name], self)}

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self.move_on(FORWARD)

    def move_on(self, direction: str) -> None:
        """New scales for all products, from the amaxes seen since the last time; all ranks of the stage together."""
        states = [getattr(scales, f"{direction}_state") for scales in self._own]
        if not states:
            return
        joint = State(torch.cat([s.scale for s in states]), torch.cat([s.amaxes for s in states], dim=1))
        if self.group.size() > 1:
            dist.all_reduce(newest := joint.amaxes[0].contiguous(), op=dist.ReduceOp.MAX, group=self.group)
            joint.amaxes[0] = newest
        after = updated(joint, self.emulation.largest(direction == FORWARD), self.emulation.history)  # type: ignore[arg-type]
        widths = [len(state.scale) for state in states]
        for state, scale, amaxes in zip(states, after.scale.split(widths), after.amaxes.split(widths, 1), strict=True):
            state.scale.copy_(scale)
            state.amaxes.copy_(amaxes)

    def _tensors(self) -> list[Tensor]:
        products = [product for chunk in self.chunks for product in states_of(chunk)]
        return [tensor for product in products for state in product.by_direction.values() for tensor in state]

    def copies(self) -> list[Tensor]:
        """The state as it is, for `put_back`."""
        return [tensor.clone() for tensor in self._tensors()]

    def put_back(self, copies: Sequence[Tensor]) -> None:
        """Makes the state what it was."""
        for tensor, copy in zip(self._tensors(), copies, strict=True):
            tensor.copy_(copy)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What is computed inside leaves no trace."""
        before = self.copies()
        try:
            yield
        finally:
            self.put_back(before)


class _ComesBack(torch.autograd.Function):
    """Identity at the beginning of an FP8 context; its gradient is there when all products of the context are done."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keeper: ScaleKeeper) -> Tensor:
        ctx.keeper = keeper
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.keeper.move_on(BACKWARD)
        return grads[0], None
