"""The portable blocks with FP8 products: what Transformer Engine's would compute, on any machine."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_joy.model.backends import portable
from megatron_joy.model.backends.blocks import Blocks
from megatron_joy.model.backends.portable_experts import PortableGroupedExperts
from megatron_joy.precision.delayed import DelayedScales
from megatron_joy.precision.emulation import Emulation, fp8_grouped, fp8_linear


class _Scaled:
    """Stands first in a class's bases. `fp8_scales`: of each of a module's weights, by its name; none where a scale
    follows from the tensor itself.
    """

    emulation: ClassVar[Emulation]
    fp8_scales: Mapping[str, DelayedScales]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        scales: dict[str, DelayedScales] = {}
        if self.emulation.history is not None:
            for name, weight in list(self.named_parameters(recurse=False)):  # type: ignore[attr-defined]
                scales[name] = DelayedScales(self.emulation.history, len(weight) if weight.dim() == 3 else 1)
                scales[name].to(weight.device)
                setattr(self, f"{name}_scales", scales[name])
        self.fp8_scales = scales


class _EmulatedParallelLinear(_Scaled):
    """Stands before one of Megatron-core's parallel linears in a class's bases; see `replacements.OVERRIDDEN`."""

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sequence_parallel: bool,
        allreduce_dgrad: bool,
        tp_group: Any = None,
        **unused: Any,
    ) -> Tensor:
        """input [s, b, k] (s over TP under sequence parallelism) -> [s, b, n]. Tokens are gathered, then scaled."""
        if bias is not None:
            raise ValueError("linears have no bias here")
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        return fp8_linear(input, weight, self.emulation, self.fp8_scales.get("weight"))


class _EmulatedLinear(_Scaled, portable.PortableLinear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [..., input_size] -> ([..., output_size], no bias)."""
        return fp8_linear(x, self.weight, self.emulation, self.fp8_scales.get("weight")), None


class _EmulatedExperts(_Scaled, PortableGroupedExperts):
    def forward(
        self, permuted_tokens: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As the portable ones; weights are rounded, and so looked at, also when no token came."""
        if permuted_tokens.shape[0] == 0:
            for name, scales in self.fp8_scales.items():
                scales.of_weight(getattr(self, name))
        return super().forward(permuted_tokens, tokens_per_expert, permuted_probs)

    def product(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """x [T, in] sorted by expert, weight [E, out, in], ends [E] -> [T, out]."""
        name = "linear_fc1" if weight is self.linear_fc1 else "linear_fc2"
        return fp8_grouped(x, weight, ends, self.emulation, self.fp8_scales.get(name))


@cache
def emulated_blocks(emulation: Emulation) -> Blocks:
    """The portable blocks under an FP8 recipe; the same classes for the same recipe, as Megatron-core compares them."""

    def under(name: str, *bases: type) -> type:
        return type(name, bases, {"emulation": emulation, "__module__": __name__})

    return replace(
        portable.BLOCKS,
        name=f"portable, {emulation.scaling} FP8 emulated",
        column_linear=under("EmulatedColumnParallelLinear", _EmulatedParallelLinear, ColumnParallelLinear),
        row_linear=under("EmulatedRowParallelLinear", _EmulatedParallelLinear, RowParallelLinear),
        duplicated_linear=under("EmulatedLinear", _EmulatedLinear),
        grouped_experts=under("EmulatedGroupedExperts", _EmulatedExperts),
    )
