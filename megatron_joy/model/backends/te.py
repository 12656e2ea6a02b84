"""Building blocks of Transformer Engine, the fast path on GPUs, with the parameter names of the portable ones.

Norms stay modules of their own instead of being fused into the next linear, so that a checkpoint written by one backend
loads into the other.
"""

from functools import partial

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

BLOCKS = Blocks(
    name="te",
    column_linear=TEColumnParallelLinear,
    row_linear=TERowParallelLinear,
    duplicated_linear=TELinear,
    norm=TENorm,
    core_attention=TEDotProductAttention,
    grouped_experts=partial(
        TEGroupedMLP,
        submodules=GroupedMLPSubmodules(
            linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear
        ),
    ),
)
