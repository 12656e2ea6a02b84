"""Building blocks of Transformer Engine, the fast path on GPUs, with the parameter names of the portable ones.

Norms stay modules of their own instead of being fused into the next linear, so that a checkpoint written by one backend
loads into the other.
"""

import importlib
from dataclasses import replace
from functools import cache, partial
from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP

from megatron_joy.model.backends.blocks import Blocks


def _experts(column: type, row: type) -> Any:
    return partial(TEGroupedMLP, submodules=GroupedMLPSubmodules(linear_fc1=column, linear_fc2=row))


BLOCKS = Blocks(
    name="te",
    column_linear=TEColumnParallelLinear,
    row_linear=TERowParallelLinear,
    duplicated_linear=TELinear,
    norm=TENorm,
    core_attention=TEDotProductAttention,
    grouped_experts=_experts(TEColumnParallelGroupedLinear, TERowParallelGroupedLinear),
)


@cache
def _outside(base: Any) -> Any:
    """A Transformer Engine module whose products stay out of the FP8 context around it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with importlib.import_module("transformer_engine.pytorch").fp8_autocast(enabled=False):
            return base.forward(self, *args, **kwargs)

    return type(
        f"HighPrecision{base.__name__}", (base,), {"forward": forward, "outside_fp8": True, "__module__": __name__}
    )


def without_fp8(blocks: Blocks) -> Blocks:
    """The same blocks for a part of the model that `precision.fp8.high_precision` names."""
    return replace(
        blocks,
        column_linear=_outside(TEColumnParallelLinear),
        row_linear=_outside(TERowParallelLinear),
        duplicated_linear=_outside(TELinear),
        grouped_experts=_experts(_outside(TEColumnParallelGroupedLinear), _outside(TERowParallelGroupedLinear)),
    )
