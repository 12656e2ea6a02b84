"""What a layout needs before it is launched: memory of every pipeline stage by kind, whether it fits, days and cost."""

from typing import Any

from megatron_joy.parallel import activations, flops
from megatron_joy.parallel.gpus import Gpu, gpu_named
from megatron_joy.parallel.states import States, stage_states
from megatron_joy.parallel.steptime import Assumptions, step_time
from megatron_joy.recipe.schema import Recipe
from megatron_joy.recipe.timetable import Timetable

GIB = 2**30
DAY = 86_400.0  # seconds
SPARE = 0.05  # of a GPU's memory; less is called tight: allocator, NCCL and CUDA context want some


def _at(recipe: Recipe, length: int, micro: int, batch: int) -> Recipe:
    data = recipe.data.model_copy(update={"sequence_length": length})
    train = recipe.train.model_copy(update={"micro_batch_size": micro, "global_batch_size": batch})
    return recipe.model_copy(update={"data": data, "train": train})


def forms(recipe: Recipe) -> list[Recipe]:
    """The recipe at each sequence length and micro-batch that its stages have, with the last batch size of those."""
    found = {(s.sequence_length, s.micro_batch_size): s.ramp.last for s in Timetable(recipe).stages}
    return [_at(recipe, length, micro, batch) for (length, micro), batch in found.items()]


def stage_memory(recipe: Recipe, stage: int, known: States | None = None) -> dict[str, int]:
    """Bytes by kind on the fullest rank of a pipeline stage; the last two kinds are estimates. `known`: its states."""
    states = known or stage_states(recipe, stage)
    here, last = activations.Pass(recipe), stage == recipe.layout.pipeline_model_parallel_size - 1
    vocabulary = recipe.model.vocab_size // recipe.layout.tensor_model_parallel_size
    logits = here.tokens * vocabulary * here.width if last else 0
    return {
        "parameters": states.parameters,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "activations": activations.stage_saved(recipe, stage) + states.router,
        "workspace": max(activations.recomputed(recipe, stage), logits) + here.hidden(4),
    }


def memory_plan(recipe: Recipe, gpu: Gpu) -> list[dict[str, Any]]:
    """Memory of every pipeline stage for each sequence length that the run has, with a verdict."""
    rows = []
    for there in forms(recipe):
        length = there.data.sequence_length
        for stage in range(recipe.layout.pipeline_model_parallel_size):
            kinds = stage_memory(there, stage)
            total = sum(kinds.values())
            rows.append(
                {"sequence_length": length, "stage": stage, **kinds, "total": total}
                | {"spare": round(gpu.memory) - total, "dispatch_worst_case": activations.dispatch_excess(there)}
                | {"verdict": _verdict(total, gpu.memory)}
            )
    return rows


def _verdict(total: int, memory: float) -> str:
    if total > memory:
        return f"too large by {(total - memory) / GIB:.1f} GiB"
    return "fits" if memory - total >= SPARE * memory else "tight"


def fits(recipe: Recipe, gpu_name: str) -> str | None:
    """None when every stage fits; else one line that says which one doesn't and by how much."""
    for row in memory_plan(recipe, gpu_named(gpu_name)):
        if row["spare"] < 0:
            where = f"pipeline stage {row['stage']} at sequence length {row['sequence_length']}"
            return f"layout: {where} is {row['verdict']} for {gpu_name}; raise a parallel degree or train.recompute"
    return None


def run_plan(recipe: Recipe, gpu: Gpu, assumed: Assumptions, mfu: float | None, price: float) -> dict[str, Any]:
    """FLOPs of the whole run, its days and its cost at a price of a GPU hour.

    Days follow from the time of an update of each stage, or from an MFU where one is given. Attention is counted over
    whole sequences, so documents that are shorter make it less.
    """
    total, tokens, seconds = 0.0, 0, 0.0
    gpus = recipe.layout.world_size
    for stage in Timetable(recipe).stages:
        keys, with_mtp = (stage.sequence_length + 1) / 2, stage.mtp_loss_factor > 0
        wanted = stage.tokens * flops.per_token(recipe, keys, with_mtp)
        if mfu is None:
            there = _at(recipe, stage.sequence_length, stage.micro_batch_size, stage.ramp.last)
            step = step_time(there, gpu, assumed, keys, with_mtp)
            seconds += stage.tokens / step.tokens * step.seconds
        else:
            seconds += wanted / (gpus * gpu.bf16 * mfu)
        total += wanted
        tokens += stage.tokens
    return {
        "gpus": gpus,
        "tokens": tokens,
        "flops_per_token": total / tokens,
        "given_mfu": mfu,
        "mfu": total / (seconds * gpus * gpu.bf16),
        "tokens_per_second_per_gpu": tokens / seconds / gpus,
        "days": seconds / DAY,
        "assumed_price_per_gpu_hour": price,
        "cost": seconds / 3600 * gpus * price,
    }
