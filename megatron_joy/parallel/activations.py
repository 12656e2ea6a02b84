"""Bytes that a forward pass saves for its backward pass on one rank, by part, under each setting of recomputation.

The terms were read off the tensors that the portable model saves (tests compare the sum with a count of them). T tokens
of a micro-batch on this rank, S of them where the sequence is split over TP too; w bytes a value. Norms on a CPU save
input and normalised input in fp32; a GPU's fused norm saves its input as it is. Experts are taken as evenly loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_joy.parallel.states import WEIGHT_BYTES
from megatron_joy.parallel.tensors import ATTENTION, DENSE, MOE, chunk_layers, chunks_of_stage
from megatron_joy.recipe.schema import Recipe

FP32, INT64 = 4, 8  # bytes
GATED = 5  # inner widths that a gated MLP saves: gate and up, the activation, the shifted up, the product


@dataclass(frozen=True)
class Pass:
    """One micro-batch of a recipe on one rank."""

    recipe: Recipe
    fused_norms: bool = True

    @property
    def width(self) -> int:
        """w: bytes of a weight or an activation."""
        return WEIGHT_BYTES[self.recipe.precision.params_dtype]

    @property
    def tokens(self) -> int:
        """T."""
        recipe = self.recipe
        return recipe.train.micro_batch_size * recipe.data.sequence_length // recipe.layout.context_parallel_size

    @property
    def split_tokens(self) -> int:
        """S."""
        return self.tokens // self.recipe.layout.tensor_model_parallel_size

    def norm(self, size: int) -> int:
        """What a norm saves."""
        values = size * self.width if self.fused_norms else 2 * size * FP32
        return self.split_tokens * (values + FP32)

    def hidden(self, layers: int = 1) -> int:
        """So many residual streams."""
        return layers * self.split_tokens * self.recipe.model.hidden_size * self.width

    def expert_rows(self, worst: bool = False) -> int:
        """Rows that this rank's experts get: evenly spread, or all that the ranks of the group can send here."""
        model, layout = self.recipe.model, self.recipe.layout
        chosen, held = model.num_experts_per_tok, model.n_routed_experts // layout.expert_model_parallel_size
        rows = self.split_tokens * layout.expert_tensor_parallel_size
        return rows * (min(chosen, held) * layout.expert_model_parallel_size if worst else chosen)

    def expert_row(self) -> int:
        """Bytes that one row of the experts saves."""
        model = self.recipe.model
        inner = model.moe_intermediate_size // self.recipe.layout.expert_tensor_parallel_size
        return (model.hidden_size + GATED * inner + 1) * self.width


def attention(here: Pass, recompute: str) -> int:
    """An MLA sub-layer with its norms. Queries, keys, values and outputs have the query's width (values are padded)."""
    model, cp = here.recipe.model, here.recipe.layout.context_parallel_size
    heads = model.num_attention_heads // here.recipe.layout.tensor_model_parallel_size
    wide, value = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim), heads * model.v_head_dim
    q, c, rope = model.q_lora_rank, model.kv_lora_rank, 4 * model.qk_rope_head_dim
    if recompute == "full":
        return here.hidden()
    latents = here.norm(q) + here.norm(c) + here.split_tokens * (q + c) * here.width
    # With context parallelism each rank has the keys and values of the whole row; to compute again it gathers again.
    core = 2 * wide + value if recompute == "selective" else 2 * wide + 2 * wide * cp
    statistics = 0 if recompute == "selective" else heads * FP32
    return (
        here.norm(model.hidden_size)
        + here.hidden()
        + latents
        + here.tokens * ((core + value + rope) * here.width + statistics)
    )


def dense(here: Pass, recompute: str) -> int:
    """A dense MLP with its norm."""
    model = here.recipe.model
    if recompute == "full":
        return here.hidden()
    inner = model.intermediate_size // here.recipe.layout.tensor_model_parallel_size
    return here.norm(model.hidden_size) + here.hidden() + here.tokens * GATED * inner * here.width


def moe(here: Pass, recompute: str) -> int:
    """A MoE layer with its norm: router, shared experts, routed experts."""
    model = here.recipe.model
    if recompute == "full":
        return here.hidden()
    outside = here.norm(model.hidden_size) + here.hidden()
    if recompute == "selective":
        return outside
    shared = model.moe_intermediate_size * model.n_shared_experts // here.recipe.layout.tensor_model_parallel_size
    chosen = model.num_experts_per_tok
    router = model.n_routed_experts * (FP32 + INT64) + chosen * (2 * INT64 + FP32) + FP32
    return (
        outside
        + here.tokens * GATED * shared * here.width
        + here.split_tokens * router
        + here.expert_rows() * here.expert_row()
    )


PARTS: dict[str, Callable[[Pass, str], int]] = {ATTENTION: attention, DENSE: dense, MOE: moe}


def head(here: Pass) -> int:
    """Head and loss: the softmax over this rank's share of the vocabulary, in fp32."""
    share = here.recipe.model.vocab_size // here.recipe.layout.tensor_model_parallel_size
    return here.hidden() + here.tokens * (share * FP32 + INT64 + FP32 + 1)


def mtp(here: Pass, recompute: str) -> int:
    """The dense MTP layer with its norms, its head and its loss."""
    h = here.recipe.model.hidden_size
    ends = here.tokens * (INT64 + 2 * FP32) + head(here)
    if recompute == "full":
        return ends + here.hidden(2)
    inside = attention(here, recompute) + dense(here, recompute)
    return ends + inside + 3 * here.norm(h) + here.hidden(2)


def chunk_saved(recipe: Recipe, chunk: int, fused_norms: bool = True) -> int:
    """Bytes that one micro-batch leaves on one rank between its forward and its backward pass through a chunk."""
    here, recompute = Pass(recipe, fused_norms), recipe.train.recompute
    saved = sum(PARTS[part](here, recompute) for part in chunk_layers(recipe, chunk))
    if chunk == 0:
        saved += here.tokens * INT64
    if chunk == recipe.layout.pipeline_chunks - 1:
        saved += here.norm(recipe.model.hidden_size) + head(here)
        saved += mtp(here, recompute) if recipe.model.num_nextn_predict_layers else 0
    return saved


def stage_saved(recipe: Recipe, stage: int) -> int:
    """Bytes of all micro-batches in flight on a stage at its worst: 1F1B, or Megatron-core's interleaved schedule."""
    layout, train = recipe.layout, recipe.train
    stages, virtual = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    batches = train.global_batch_size // (train.micro_batch_size * layout.data_parallel_size)
    ahead = stages - stage - 1
    passes = ahead + 1 if virtual == 1 else 2 * ahead + (virtual - 1) * stages + 1
    passes = min(passes, batches * virtual)
    chunks = chunks_of_stage(recipe, stage)
    return sum(chunk_saved(recipe, chunks[(number // stages) % virtual]) for number in range(passes))


def recomputed(recipe: Recipe, stage: int) -> int:
    """Bytes of the largest sub-layer when it is computed again, or of its gradients: one at a time."""
    here = Pass(recipe)
    found = {part for chunk in chunks_of_stage(recipe, stage) for part in chunk_layers(recipe, chunk)}
    return max(PARTS[part](here, "none") for part in found)


def dispatch_excess(recipe: Recipe) -> int:
    """Bytes beyond an even load if one MoE layer sent every token to the experts of one rank."""
    here = Pass(recipe)
    return (here.expert_rows(worst=True) - here.expert_rows()) * here.expert_row()
