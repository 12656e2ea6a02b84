"""A recipe as Megatron-core's configuration objects."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_joy.model.backends.select import transformer_engine_problem
from megatron_joy.recipe.schema import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _init_method(std: float) -> Any:
    def init(weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.init.normal_(weight, mean=0.0, std=std)

    return init


def _architecture(recipe: Recipe) -> dict[str, Any]:
    model = recipe.model
    return {
        # HybridModel counts attention and feed-forward as layers of their own.
        "num_layers": 2 * model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.intermediate_size,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_nope_head_dim,
        "qk_pos_emb_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "rope_type": "rope",
        "rotary_base": model.rope_theta,
        "rotary_scaling_factor": 1.0,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method": _init_method(model.initializer_range),
        "output_layer_init_method": _init_method(model.initializer_range),
        "init_method_std": model.initializer_range,
        "mtp_num_layers": model.num_nextn_predict_layers or None,
        "mtp_loss_scaling_factor": model.mtp_loss_factor,
    }


def _experts(recipe: Recipe) -> dict[str, Any]:
    model = recipe.model
    return {
        "num_moe_experts": model.n_routed_experts,
        "moe_ffn_hidden_size": model.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": model.n_shared_experts * model.moe_intermediate_size,
        "moe_router_topk": model.num_experts_per_tok,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": model.router_bias_update_rate,
        "moe_router_topk_scaling_factor": model.routed_scaling_factor,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
    }


def _layout(recipe: Recipe) -> dict[str, Any]:
    layout = recipe.layout
    interleaved = layout.virtual_pipeline_model_parallel_size > 1
    on_gpu = torch.cuda.is_available()
    return {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline_model_parallel_size if interleaved else None,
        "context_parallel_size": layout.context_parallel_size,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel_size,
        "sequence_parallel": layout.tensor_model_parallel_size > 1,
        # gloo still reads a sent activation after the schedule would have freed it.
        "deallocate_pipeline_outputs": on_gpu,
        # With two stages both neighbours are the same rank: batched sends of interleaved chunks would be mixed up.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _fp8(recipe: Recipe) -> dict[str, Any]:
    """What Megatron-core tells Transformer Engine; nothing where that isn't there or our own blocks emulate FP8."""
    fp8 = recipe.precision.fp8
    if fp8.recipe == "off" or fp8.emulate or transformer_engine_problem() is not None:
        return {}
    # Transformer Engine's FP8 products want whole groups of tokens for each expert.
    told: dict[str, Any] = {"fp8": fp8.format, "fp8_recipe": fp8.recipe, "moe_router_padding_for_quantization": True}
    if fp8.recipe == "delayed":
        told |= {
            "fp8_amax_history_len": fp8.amax_history_len,
            "fp8_amax_compute_algo": fp8.amax_compute_algo,
            "fp8_margin": fp8.margin,
        }
    return told


def transformer_config(recipe: Recipe) -> MLATransformerConfig:
    """Megatron-core's configuration of the recipe's model under the recipe's layout and precision."""
    dtype = DTYPES[recipe.precision.params_dtype]
    return MLATransformerConfig(
        **_architecture(recipe),
        **_experts(recipe),
        **_layout(recipe),
        **RECOMPUTE[recipe.train.recompute],
        **_fp8(recipe),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Losses and gradients are sums over tokens, divided once by the step's global token count: exact in any layout.
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        perform_initialization=False,
    )
