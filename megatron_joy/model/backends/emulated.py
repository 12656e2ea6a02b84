"""The portable blocks with FP8 products: what Transformer Engine's would compute, on any machine."""

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
from megatron_joy.precision.emulation import Emulation, fp8_grouped, fp8_linear


class _EmulatedParallelLinear:
    """Stands before one of Megatron-core's parallel linears in a class's bases; see `replacements.OVERRIDDEN`."""

    emulation: ClassVar[Emulation]

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
        return fp8_linear(input, weight, self.emulation)


class _EmulatedLinear(portable.PortableLinear):
    emulation: ClassVar[Emulation]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [..., input_size] -> ([..., output_size], no bias)."""
        return fp8_linear(x, self.weight, self.emulation), None


class _EmulatedExperts(PortableGroupedExperts):
    emulation: ClassVar[Emulation]

    def product(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """x [T, in] sorted by expert, weight [E, out, in], ends [E] -> [T, out]."""
        return fp8_grouped(x, weight, ends, self.emulation)


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
