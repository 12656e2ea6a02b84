"""Model FLOPs of a token by formula: matrix products of forward and backward pass, recomputation left out.

A product of [1, a] with [a, b] is 2ab FLOPs, its backward pass twice that. A token attends to `keys` positions on
average: (L + 1) / 2 in a document of L tokens.
"""

from megatron_joy.recipe.schema import Recipe

TRAINING = 3  # a forward pass, and a backward pass of twice its products


def attention_core(recipe: Recipe, keys: float) -> float:
    """Forward FLOPs of an MLA sub-layer's products of queries, keys and values alone."""
    model = recipe.model
    wide = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    return 2.0 * model.num_attention_heads * wide * keys


def attention(recipe: Recipe, keys: float) -> float:
    """Forward FLOPs of an MLA sub-layer."""
    model = recipe.model
    h, heads, q, c = model.hidden_size, model.num_attention_heads, model.q_lora_rank, model.kv_lora_rank
    nope, rope, e = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
    weights = h * q + q * heads * (nope + rope) + h * (c + rope) + c * heads * (nope + e) + heads * e * h
    return 2 * weights + attention_core(recipe, keys)


def dense(recipe: Recipe) -> float:
    """Forward FLOPs of a dense gated MLP."""
    return 6.0 * recipe.model.hidden_size * recipe.model.intermediate_size


def moe(recipe: Recipe) -> float:
    """Forward FLOPs of a MoE layer: router, chosen and shared experts."""
    model = recipe.model
    used = model.num_experts_per_tok + model.n_shared_experts
    return 2.0 * model.hidden_size * (model.n_routed_experts + 3 * used * model.moe_intermediate_size)


def per_token(recipe: Recipe, keys: float, with_mtp: bool = True) -> float:
    """FLOPs of training on a token: all layers, the head and, with MTP, its dense layer and its pass of the head."""
    model = recipe.model
    first = model.first_k_dense_replace
    head = 2.0 * model.hidden_size * model.vocab_size
    layers = model.num_hidden_layers * attention(recipe, keys) + first * dense(recipe)
    total = layers + (model.num_hidden_layers - first) * moe(recipe) + head
    if with_mtp and model.num_nextn_predict_layers:
        total += 4.0 * model.hidden_size**2 + attention(recipe, keys) + dense(recipe) + head
    return TRAINING * total
