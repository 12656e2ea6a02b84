"""Every parameter that a rank holds: its shape under the layout, in the order in which the model registers it.

The order matters because the distributed optimizer lays parameters end to end in it (see `parallel.states`). Letters:
h hidden size, n heads, q and c the widths of the query and key-value latents, d query and key width of a head, e value
width, f inner width of a feed-forward part. A test holds names, order and sizes against the model itself.
"""

import math
from dataclasses import dataclass

from megatron_joy.recipe.schema import Recipe

ATTENTION, DENSE, MOE = "+", "-", "E"


@dataclass(frozen=True)
class Tensor:
    """One parameter on one rank.

    `expert`: its replicas are the expert data-parallel ranks, and it lies in a buffer of theirs.
    `shared`: the first and the last pipeline stage both have it (the embedding, for MTP), in a bucket of its own.
    """

    name: str
    shape: tuple[int, ...]
    expert: bool = False
    shared: bool = False

    @property
    def numel(self) -> int:
        """Values on this rank."""
        return math.prod(self.shape)


def chunk_layers(recipe: Recipe, chunk: int) -> list[str]:
    """The sub-layers of a pipeline chunk in model order: ATTENTION and then DENSE or MOE for each decoder layer."""
    counts = recipe.layout.pipeline_layer_counts or _equal(recipe)
    first = sum(counts[:chunk])
    dense = recipe.model.first_k_dense_replace
    layers = range(first, first + counts[chunk])
    return [part for layer in layers for part in (ATTENTION, DENSE if layer < dense else MOE)]


def _equal(recipe: Recipe) -> list[int]:
    chunks = recipe.layout.pipeline_chunks
    return [recipe.model.num_hidden_layers // chunks] * chunks


def chunks_of_stage(recipe: Recipe, stage: int) -> list[int]:
    """The pipeline chunks that a stage holds: one, or with interleaving every PP-th."""
    return list(range(stage, recipe.layout.pipeline_chunks, recipe.layout.pipeline_model_parallel_size))


def _attention(recipe: Recipe) -> list[Tensor]:
    model, tp = recipe.model, recipe.layout.tensor_model_parallel_size
    h, heads, q, c = model.hidden_size, model.num_attention_heads // tp, model.q_lora_rank, model.kv_lora_rank
    nope, rope, e = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
    prefix = "self_attention."
    return [
        Tensor("input_layernorm.weight", (h,)),
        Tensor(f"{prefix}linear_proj.weight", (h, heads * e)),
        Tensor(f"{prefix}linear_q_down_proj.weight", (q, h)),
        Tensor(f"{prefix}linear_q_up_proj.weight", (heads * (nope + rope), q)),
        Tensor(f"{prefix}linear_kv_down_proj.weight", (c + rope, h)),
        Tensor(f"{prefix}linear_kv_up_proj.weight", (heads * (nope + e), c)),
        Tensor(f"{prefix}q_layernorm.weight", (q,)),
        Tensor(f"{prefix}kv_layernorm.weight", (c,)),
    ]


def _gated(prefix: str, h: int, f: int) -> list[Tensor]:
    return [Tensor(f"{prefix}linear_fc1.weight", (2 * f, h)), Tensor(f"{prefix}linear_fc2.weight", (h, f))]


def _dense(recipe: Recipe) -> list[Tensor]:
    h, f = recipe.model.hidden_size, recipe.model.intermediate_size
    norm = Tensor("pre_mlp_layernorm.weight", (h,))
    return [norm, *_gated("mlp.", h, f // recipe.layout.tensor_model_parallel_size)]


def _moe(recipe: Recipe) -> list[Tensor]:
    model, layout = recipe.model, recipe.layout
    h, experts = model.hidden_size, model.n_routed_experts // layout.expert_model_parallel_size
    f = model.moe_intermediate_size // layout.expert_tensor_parallel_size
    shared = model.moe_intermediate_size * model.n_shared_experts // layout.tensor_model_parallel_size
    own = experts_have_own_replicas(recipe)
    return [
        Tensor("pre_mlp_layernorm.weight", (h,)),
        Tensor("mlp.router.weight", (model.n_routed_experts, h)),
        Tensor("mlp.experts.linear_fc1", (experts, 2 * f, h), own),
        Tensor("mlp.experts.linear_fc2", (experts, h, f), own),
        *_gated("mlp.shared_experts.", h, shared),
    ]


def experts_have_own_replicas(recipe: Recipe) -> bool:
    """Whether expert gradients are reduced over other ranks than dense ones (Megatron-core's rule)."""
    layout = recipe.layout
    return (
        layout.expert_model_parallel_size > 1 or layout.expert_tensor_parallel_size != layout.tensor_model_parallel_size
    )


_PARTS = {ATTENTION: _attention, DENSE: _dense, MOE: _moe}


def _named(prefix: str, tensors: list[Tensor]) -> list[Tensor]:
    return [Tensor(prefix + tensor.name, tensor.shape, tensor.expert) for tensor in tensors]


def _mtp(recipe: Recipe) -> list[Tensor]:
    h, tp = recipe.model.hidden_size, recipe.layout.tensor_model_parallel_size
    inside = [*_named("layers.0.", _attention(recipe)), *_named("layers.1.", _dense(recipe))]
    whole = [
        Tensor("enorm.weight", (h,)),
        Tensor("hnorm.weight", (h,)),
        Tensor("eh_proj.weight", (h // tp, 2 * h)),
        *_named("mtp_model_layer.", inside),
        Tensor("final_layernorm.weight", (h,)),
    ]
    return _named("mtp.layers.0.", whole)


def chunk_tensors(recipe: Recipe, chunk: int) -> list[Tensor]:
    """All parameters of a pipeline chunk on one rank; every rank of the stage has the same shapes."""
    model, last = recipe.model, recipe.layout.pipeline_chunks - 1
    h, vocabulary = model.hidden_size, model.vocab_size // recipe.layout.tensor_model_parallel_size
    found: list[Tensor] = []
    with_mtp = model.num_nextn_predict_layers > 0
    if chunk == 0 or (chunk == last and with_mtp):
        shared = with_mtp and recipe.layout.pipeline_model_parallel_size > 1
        found.append(Tensor("embedding.word_embeddings.weight", (vocabulary, h), shared=shared))
    for index, part in enumerate(chunk_layers(recipe, chunk)):
        found += _named(f"decoder.layers.{index}.", _PARTS[part](recipe))
    if chunk == last:
        found.append(Tensor("decoder.final_norm.weight", (h,)))
        found += _mtp(recipe) if with_mtp else []
        found.append(Tensor("output_layer.weight", (vocabulary, h)))
    return found
