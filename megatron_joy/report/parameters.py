"""How many parameters a recipe's model has, by closed form, so that a report needs neither torch nor the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Parameters of the main model (`total`; the MTP layer is `mtp`) and those that one token runs through.

    `active` counts the router, the shared expert and `num_experts_per_tok` experts of each MoE layer and both
    vocabulary tables, as the released model's description does.
    """

    total: int
    active: int
    mtp: int


def count_parameters(model: Mapping[str, Any]) -> ParameterCounts | None:
    """Counts from a recipe's [model] table; None when a needed key is missing.

    The formulas are those of the released weights (arXiv 2604.03044, Table 1: 48.9B for joyai_48b_a3b).
    """
    try:
        return _count(model)
    except (KeyError, TypeError):
        return None


def _count(m: Mapping[str, Any]) -> ParameterCounts:
    hidden, heads, vocabulary = m["hidden_size"], m["num_attention_heads"], m["vocab_size"]
    nope, rope, value = m["qk_nope_head_dim"], m["qk_rope_head_dim"], m["v_head_dim"]
    query_rank, kv_rank = m["q_lora_rank"], m["kv_lora_rank"]
    attention = (
        hidden * query_rank
        + query_rank
        + query_rank * heads * (nope + rope)
        + hidden * (kv_rank + rope)
        + kv_rank
        + kv_rank * heads * (nope + value)
        + heads * value * hidden
    )
    layer = attention + 2 * hidden
    dense = 3 * hidden * m["intermediate_size"]
    expert = 3 * hidden * m["moe_intermediate_size"]
    experts, shared = m["n_routed_experts"], m.get("n_shared_experts", 1)
    router = experts * hidden + experts
    dense_layers = m.get("first_k_dense_replace", 1)
    moe_layers = m["num_hidden_layers"] - dense_layers
    common = m["num_hidden_layers"] * layer + dense_layers * dense + 2 * vocabulary * hidden + hidden
    mtp = m.get("num_nextn_predict_layers", 1) * (2 * hidden * hidden + 3 * hidden + layer + dense)
    return ParameterCounts(
        total=common + moe_layers * ((experts + shared) * expert + router),
        active=common + moe_layers * ((m["num_experts_per_tok"] + shared) * expert + router),
        mtp=mtp,
    )
