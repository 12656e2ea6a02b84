"""Megatron-core's layer specifications for JoyAI, made from a backend's blocks."""

from collections.abc import Mapping
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer import ModuleSpec, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)

from megatron_joy.model.backends.blocks import Blocks
from megatron_joy.model.balance import BalancedRouter


def _attention(blocks: Blocks) -> ModuleSpec:
    attention = ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=blocks.column_linear,
            linear_q_down_proj=blocks.duplicated_linear,
            linear_q_up_proj=blocks.column_linear,
            linear_kv_down_proj=blocks.duplicated_linear,
            linear_kv_up_proj=blocks.column_linear,
            core_attention=blocks.core_attention,
            linear_proj=blocks.row_linear,
            q_layernorm=blocks.norm,
            kv_layernorm=blocks.norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=blocks.norm, self_attention=attention, self_attn_bda=get_bias_dropout_add
        ),
    )


def _linears(blocks: Blocks) -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=blocks.column_linear, linear_fc2=blocks.row_linear)


def _feed_forward(blocks: Blocks, parts: Mapping[str, Blocks]) -> tuple[ModuleSpec, ModuleSpec]:
    linears = _linears(parts.get("dense_mlp", blocks))
    experts = MoESubmodules(
        experts=parts.get("routed_experts", blocks).grouped_experts,
        router=BalancedRouter,
        shared_experts=partial(SharedExpertMLP, submodules=_linears(parts.get("shared_experts", blocks))),
    )
    dense = ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=blocks.norm,
            mlp=partial(MLP.as_mlp_submodule, submodules=linears),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    sparse = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=blocks.norm, mlp=partial(MoELayer, submodules=experts), mlp_bda=get_bias_dropout_add
        ),
    )
    return dense, sparse


def stack_spec(blocks: Blocks, parts: Mapping[str, Blocks] | None = None) -> ModuleSpec:
    """The specification of HybridModel's layer kinds: MLA, dense MLP, MoE and the MTP layer around them.

    parts: other blocks for some parts of the model (see `backends.select.fp8_blocks`).
    """
    parts = parts or {}
    dense, sparse = _feed_forward(blocks, parts)
    prediction_layer = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=blocks.norm,
            hnorm=blocks.norm,
            eh_proj=parts.get("mtp_projection", blocks).column_linear,
            mtp_model_layer=None,  # HybridModel builds it from the pattern
            layer_norm=blocks.norm,
        ),
    )
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            mla_layer=_attention(parts.get("attention", blocks)),
            mlp_layer=dense,
            moe_layer=sparse,
            mtp_block_spec=ModuleSpec(
                module=MultiTokenPredictionBlock,
                submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[prediction_layer]),
            ),
        ),
    )
