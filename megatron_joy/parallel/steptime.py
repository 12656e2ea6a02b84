"""How long an update takes under stated assumptions: products, collectives, the pipeline's bubble, the optimizer.

A model, not a forecast: it says which layout is better and what limits it. Only what is in `Assumptions` is assumed;
all other figures follow from the recipe and the vendor's table.
"""

from dataclasses import dataclass

from megatron_joy.parallel import flops
from megatron_joy.parallel.communication import Flow, micro_batches, pass_flows, stage_flows
from megatron_joy.parallel.gpus import Gpu
from megatron_joy.parallel.states import FP32, WEIGHT_BYTES, MuonBuffer, buffers
from megatron_joy.parallel.tensors import ATTENTION, DENSE, MOE, chunk_layers, chunks_of_stage
from megatron_joy.recipe.schema import Recipe

PER_MICRO_BATCH = ("tensor", "context", "expert", "pipeline")


@dataclass(frozen=True)
class Assumptions:
    """`kernels`: share of the peak that a pass reaches, all that isn't a product included. `links`: share of a link's
    peak that collectives reach. `overlap`: share of the time of collectives that is hidden behind products.
    """

    kernels: float = 0.5
    links: float = 0.8
    overlap: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update. `model_flops` are those of the whole world, recomputation left out."""

    products: float
    recomputed: float
    tensor: float
    context: float
    expert: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float
    tokens: int
    model_flops: float

    @property
    def seconds(self) -> float:
        """All of them."""
        kinds = (self.products, self.recomputed, self.tensor, self.context, self.expert, self.pipeline)
        return sum(kinds) + self.bubble + self.data + self.optimizer

    def mfu(self, gpu: Gpu, gpus: int) -> float:
        """Model FLOPs over what the GPUs could have computed."""
        return self.model_flops / (self.seconds * gpu.bf16 * gpus)


def flow_seconds(flow: Flow, gpu: Gpu, links: float) -> float:
    """Seconds that a flow takes when nothing else is sent.

    A ring that leaves the node uses the cards of all its members there; of what goes to every rank, the share of other
    nodes' ranks goes through this rank's own card.
    """
    inside = max(1, min(flow.ranks, gpu.per_node // flow.stride))  # members in one node
    if inside >= flow.ranks:
        return flow.sent / (gpu.link * links)
    if flow.pattern == "pairs":
        outside = (flow.ranks - inside) / (flow.ranks - 1)
        return max(flow.sent * (1 - outside) / gpu.link, flow.sent * outside / gpu.network) / links
    width = gpu.network if flow.pattern == "send" else min(gpu.link, gpu.network * inside)
    return flow.sent / (width * links)


def stage_flops(recipe: Recipe, stage: int, keys: float, with_mtp: bool = True) -> tuple[float, float]:
    """(FLOPs of training, FLOPs computed again) of one token on a pipeline stage, over all ranks that share it."""
    costs = {
        ATTENTION: flops.attention(recipe, keys),
        DENSE: flops.dense(recipe),
        MOE: flops.moe(recipe),
    }
    model, recompute = recipe.model, recipe.train.recompute
    parts = [part for chunk in chunks_of_stage(recipe, stage) for part in chunk_layers(recipe, chunk)]
    total = 0.0
    if stage == recipe.layout.pipeline_model_parallel_size - 1:
        head = 2.0 * model.hidden_size * model.vocab_size
        total += head
        if with_mtp and model.num_nextn_predict_layers:
            parts += [ATTENTION, DENSE]
            total += head + 4.0 * model.hidden_size**2
    total += sum(costs[part] for part in parts)
    again = 0.0
    if recompute == "full":
        again = sum(costs[part] for part in parts)
    elif recompute == "selective":
        core = flops.attention_core(recipe, keys)
        again = parts.count(ATTENTION) * core + parts.count(MOE) * costs[MOE]
    return flops.TRAINING * total, again


def optimizer_seconds(recipe: Recipe, stage: int, gpu: Gpu, assumed: Assumptions) -> float:
    """Reading gradient, master and moments of the values that a rank owns, writing them and the weight; for Muon the
    products of Newton-Schulz too.
    """
    width = WEIGHT_BYTES[recipe.precision.params_dtype]
    moved, multiplied = 0.0, 0.0
    for chunk in chunks_of_stage(recipe, stage):
        for _, buffer in buffers(recipe, chunk):
            moved += max(buffer.owned()) * (FP32 + 2 * (1 + buffer.moments) * FP32 + width)
            if isinstance(buffer, MuonBuffer):
                multiplied += max(buffer.placement.costs) * recipe.optimizer.muon_steps
    return moved / gpu.hbm + 2 * multiplied / (gpu.bf16 * assumed.kernels)


@dataclass(frozen=True)
class UpdateTime:
    """Seconds at an update's end, of the slowest stage: gradients and weights sent, and the optimizer. They don't
    depend on what is recomputed.
    """

    data: float
    optimizer: float


def update_time(recipe: Recipe, gpu: Gpu, assumed: Assumptions) -> UpdateTime:
    """What comes once an update."""
    stages = distinct_stages(recipe)
    sent = [
        sum(flow_seconds(flow, gpu, assumed.links) for flow in stage_flows(recipe, stage) if flow.once)
        for stage in stages
    ]
    spent = max(optimizer_seconds(recipe, stage, gpu, assumed) for stage in stages)
    return UpdateTime(max(sent) * (1 - assumed.overlap), spent)


def distinct_stages(recipe: Recipe) -> list[int]:
    """Pipeline stages of which one is the largest in anything: the first, the last, and one of each size between."""
    layout = recipe.layout
    stages, counts = layout.pipeline_model_parallel_size, layout.pipeline_layer_counts or []
    between = {
        tuple(counts[chunk] for chunk in chunks_of_stage(recipe, stage)) if counts else (): stage
        for stage in range(stages - 2, 0, -1)
    }
    return sorted({0, stages - 1, *between.values()})


def step_time(
    recipe: Recipe,
    gpu: Gpu,
    assumed: Assumptions,
    keys: float | None = None,
    with_mtp: bool = True,
    known: UpdateTime | None = None,
) -> StepTime:
    """One update of a recipe with one sequence length and one batch size. `keys`: positions that a token attends to on
    average; None: whole sequences. The slowest stage sets the pace of all. `known`: what `update_time` gives.
    """
    layout, batches = recipe.layout, micro_batches(recipe)
    length = recipe.data.sequence_length
    keys = (length + 1) / 2 if keys is None else keys
    tokens = recipe.train.micro_batch_size * length  # of a micro-batch, over the ranks that share it
    share = layout.tensor_model_parallel_size * layout.context_parallel_size
    rate, shown = gpu.bf16 * assumed.kernels, 1 - assumed.overlap
    slowest: dict[str, float] = {}
    for stage in distinct_stages(recipe):
        trained, again = stage_flops(recipe, stage, keys, with_mtp)
        kinds = {"products": trained * tokens / share / rate, "recomputed": again * tokens / share / rate}
        kinds |= dict.fromkeys(PER_MICRO_BATCH, 0.0)
        for flow in pass_flows(recipe, stage):
            kinds[flow.kind] += flow_seconds(flow, gpu, assumed.links) * shown / batches
        slowest = max(slowest, kinds, key=lambda each: sum(each.values()))
    behind = (layout.pipeline_model_parallel_size - 1) / layout.virtual_pipeline_model_parallel_size
    end = known or update_time(recipe, gpu, assumed)
    whole = recipe.train.global_batch_size * length
    return StepTime(
        **{kind: seconds * batches for kind, seconds in slowest.items()},
        bubble=behind * sum(slowest.values()),
        data=end.data,
        optimizer=end.optimizer,
        tokens=whole,
        model_flops=flops.per_token(recipe, keys, with_mtp) * whole,
    )
