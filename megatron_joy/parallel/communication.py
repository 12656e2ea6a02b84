"""Bytes that one rank sends in one update, by kind of parallelism; without torch.

Read off the collectives of Megatron-core as this package sets it up: a test counts them in gloo worlds. Of n ranks, one
sends (n-1)/n of what an all-gather ends with, of what a reduce-scatter begins with, and of what it gives to an
all-to-all, and twice that for an all-reduce. Experts are taken as evenly loaded. Left out are counters of a few bytes.

A micro-batch has T tokens on a rank, S of them where the sequence is split over TP; w is the bytes of a value.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_joy.parallel.activations import Pass
from megatron_joy.parallel.kinds import kind_of
from megatron_joy.parallel.states import FP32, WEIGHT_BYTES, buffers, replicas
from megatron_joy.parallel.tensors import (
    ATTENTION,
    DENSE,
    MOE,
    chunk_layers,
    chunk_tensors,
    chunks_of_stage,
    experts_have_own_replicas,
)
from megatron_joy.recipe.schema import Recipe

Kind = Literal["tensor", "context", "expert", "pipeline", "data"]
# ring: every rank passes on to its neighbour; pairs: every rank has something for every other; send: to one other.
Pattern = Literal["ring", "pairs", "send"]


@dataclass(frozen=True)
class Flow:
    """What one rank sends in one update in groups of `ranks`, whose members are `stride` ranks apart.

    `once`: at the update's end; all else is sent for each micro-batch.
    """

    kind: Kind
    what: str
    pattern: Pattern
    ranks: int
    stride: int
    sent: float
    once: bool = False


def micro_batches(recipe: Recipe) -> int:
    """Of one data-parallel rank in one update."""
    return recipe.train.global_batch_size // (recipe.train.micro_batch_size * recipe.layout.data_parallel_size)


def pass_flows(recipe: Recipe, stage: int) -> list[Flow]:
    """What a rank of a pipeline stage sends in the passes of an update's micro-batches; groups of one are left out."""
    found = [*_tensor(recipe, stage), *_context(recipe, stage), *_expert(recipe, stage), *_pipeline(recipe, stage)]
    return [flow for flow in found if flow.ranks > 1 and flow.sent]


def stage_flows(recipe: Recipe, stage: int) -> list[Flow]:
    """All that a rank of a pipeline stage sends in one update; groups of one are left out."""
    found = [*_shared_gradients(recipe, stage), *_whole_matrices(recipe, stage), *_data(recipe, stage)]
    return pass_flows(recipe, stage) + [flow for flow in found if flow.ranks > 1 and flow.sent]


def by_kind(flows: Iterable[Flow]) -> dict[str, float]:
    """Bytes of each kind."""
    total: dict[str, float] = {}
    for flow in flows:
        total[flow.kind] = total.get(flow.kind, 0.0) + flow.sent
    return total


def _parts(recipe: Recipe, stage: int) -> list[str]:
    """The sub-layers of a stage, those of the MTP layer included."""
    chunks = chunks_of_stage(recipe, stage)
    parts = [part for chunk in chunks for part in chunk_layers(recipe, chunk)]
    return parts + ([ATTENTION, DENSE] if _has_mtp(recipe, stage) else [])


def _has_mtp(recipe: Recipe, stage: int) -> bool:
    return recipe.model.num_nextn_predict_layers > 0 and _is_last(recipe, stage)


def _is_last(recipe: Recipe, stage: int) -> bool:
    return stage == recipe.layout.pipeline_model_parallel_size - 1


def _again(recipe: Recipe, part: str) -> int:
    """How often the forward pass of a sub-layer is computed a second time."""
    return int(recipe.train.recompute == "full" or (recipe.train.recompute == "selective" and part == MOE))


def _tensor(recipe: Recipe, stage: int) -> Iterable[Flow]:
    """Sequence parallelism: what is split over tokens is gathered before a product and scattered after it."""
    here, model, tp = Pass(recipe), recipe.model, recipe.layout.tensor_model_parallel_size
    wide = model.hidden_size
    # (widths gathered or scattered in the forward pass, in the backward pass): a gathered input is gathered again for
    # the weight's gradient, and its own gradient scattered.
    latents = model.q_lora_rank + model.kv_lora_rank
    ways = {
        ATTENTION: (latents + model.qk_rope_head_dim + wide, 2 * latents + model.qk_rope_head_dim + wide),
        DENSE: (2 * wide, 3 * wide),
        MOE: (2 * wide, 3 * wide),  # the shared experts
    }
    parts = _parts(recipe, stage)
    widths = sum(ways[part][0] * (1 + _again(recipe, part)) + ways[part][1] for part in parts)
    if stage == 0:
        widths += 2 * wide  # embedding
    sums = 0.0
    if _is_last(recipe, stage):
        widths += 3 * wide  # head
        sums += 3 * FP32  # of the softmax: maximum, label's logit, sum
    if _has_mtp(recipe, stage):
        widths += 2 * wide + 6 * wide + 2 * wide + 3 * wide  # embedding, projection and its output, head
        sums += 3 * FP32
    times = micro_batches(recipe)
    gathered = (tp - 1) / tp * here.tokens * widths * here.width * times
    reduced = 2 * (tp - 1) / tp * here.tokens * sums * times
    yield Flow("tensor", "gathered and scattered activations", "ring", tp, 1, gathered)
    yield Flow("tensor", "sums of the softmax", "ring", tp, 1, reduced)


def _context(recipe: Recipe, stage: int) -> Iterable[Flow]:
    """Keys and values are gathered, their gradients scattered; recomputed attention gathers again."""
    here, model, layout = Pass(recipe), recipe.model, recipe.layout
    cp, heads = layout.context_parallel_size, model.num_attention_heads // layout.tensor_model_parallel_size
    wide = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim)
    times = 2 if recipe.train.recompute == "none" else 3
    count = sum(part == ATTENTION for part in _parts(recipe, stage))
    sent = (cp - 1) * here.tokens * wide * here.width * times * count * micro_batches(recipe)
    yield Flow("context", "keys and values", "ring", cp, layout.tensor_model_parallel_size, sent)


def _expert(recipe: Recipe, stage: int) -> Iterable[Flow]:
    """Tokens to the ranks of their experts and back, their gradients the same way; weights of the choice in fp32."""
    here, layout, model = Pass(recipe), recipe.layout, recipe.model
    ep, etp = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    rows = here.split_tokens * model.num_experts_per_tok
    again = _again(recipe, MOE)
    count = sum(part == MOE for part in _parts(recipe, stage)) * micro_batches(recipe)
    row = model.hidden_size * here.width
    sent = (ep - 1) / ep * rows * (row * (4 + 2 * again) + FP32 * (2 + again))
    yield Flow("expert", "dispatched tokens", "pairs", ep, etp, sent * count)
    yield Flow(
        "expert",
        "tokens for split experts",
        "ring",
        etp,
        1,
        (etp - 1) * rows * (row * (4 + 2 * again) + FP32 * (2 + again)) * count,
    )


def _pipeline(recipe: Recipe, stage: int) -> Iterable[Flow]:
    """The residual stream forward, its gradient backward, for each chunk's end; gradients of the shared embedding."""
    here, layout = Pass(recipe), recipe.layout
    pp, stride = layout.pipeline_model_parallel_size, layout.world_size // layout.pipeline_model_parallel_size
    if pp == 1:
        return
    chunks = chunks_of_stage(recipe, stage)
    sends = sum((chunk < layout.pipeline_chunks - 1) + (chunk > 0) for chunk in chunks)
    yield Flow("pipeline", "residual stream", "send", pp, stride, here.hidden() * sends * micro_batches(recipe))


SHARED = ("norm.weight", ".router.weight", "_down_proj.weight")


def _shared_gradients(recipe: Recipe, stage: int) -> Iterable[Flow]:
    """Gradients of weights that all TP ranks have whole, and of the embedding that the first and last stage have."""
    layout, model = recipe.layout, recipe.model
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    tensors = [tensor for chunk in chunks_of_stage(recipe, stage) for tensor in chunk_tensors(recipe, chunk)]
    whole = sum(tensor.numel * FP32 for tensor in tensors if tensor.name.endswith(SHARED))
    yield Flow("tensor", "gradients of what TP ranks share", "ring", tp, 1, 2 * (tp - 1) / tp * whole, True)
    if model.num_nextn_predict_layers and pp > 1 and stage in (0, pp - 1):
        table, stride = model.vocab_size // tp * model.hidden_size * FP32, layout.world_size // pp * (pp - 1)
        yield Flow("pipeline", "gradients of the shared embedding", "ring", 2, stride, float(table), True)


def _whole_matrices(recipe: Recipe, stage: int) -> Iterable[Flow]:
    """Muon gathers the parts of a split matrix, in fp32, before Newton-Schulz; the replicas share the matrices out.

    Taken as evenly shared, which whole matrices can't quite be.
    """
    if recipe.optimizer.name != "muon":
        return
    layout = recipe.layout
    values = {"tensor": 0.0, "expert": 0.0}
    for tensor in (tensor for chunk in chunks_of_stage(recipe, stage) for tensor in chunk_tensors(recipe, chunk)):
        kind = kind_of(tensor.name)
        if kind.optimizer == "muon" and kind.split is not None:
            values["expert" if kind.stacked else "tensor"] += tensor.numel / replicas(recipe, tensor.expert)
    tp, etp = layout.tensor_model_parallel_size, layout.expert_tensor_parallel_size
    yield Flow("tensor", "matrices for Muon", "ring", tp, 1, (tp - 1) * values["tensor"] * FP32, True)
    yield Flow("expert", "experts' matrices for Muon", "ring", etp, 1, (etp - 1) * values["expert"] * FP32, True)


def _data(recipe: Recipe, stage: int) -> Iterable[Flow]:
    """ZeRO-1: gradients are scattered in fp32 and weights gathered.

    Where experts have replicas of their own AdamW is two optimizers, and each of Megatron-core's gathers all weights.
    """
    layout, width = recipe.layout, WEIGHT_BYTES[recipe.precision.params_dtype]
    held = [each for chunk in chunks_of_stage(recipe, stage) for each in buffers(recipe, chunk)]
    gathers = 2 if recipe.optimizer.name == "adamw" and experts_have_own_replicas(recipe) else 1
    for expert in (False, True):
        ranks, stride = replicas(recipe, expert), layout.tensor_model_parallel_size
        if expert:
            stride = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
        values = sum(buffer.length for own, buffer in held if own is expert)
        share, whose = (ranks - 1) / ranks * values, "experts" if expert else "other weights"
        yield Flow("data", f"gradients of {whose}", "ring", ranks, stride, share * FP32, True)
        yield Flow("data", f"{whose} after the update", "ring", ranks, stride, share * width * gathers, True)
