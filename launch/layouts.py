"""Layouts of a recipe for a number of GPUs, best first: those that fit, by the time of an update.

Searched: TP, PP, VPP, CP, EP and recomputation, with the recipe's micro-batches and ETP 1 (splitting an expert's
matrices makes small products smaller). A layout may change in mid-course, so each sequence length of a run has a
ranking.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from launch.plan import SPARE, forms, stage_memory
from megatron_joy.errors import UserError
from megatron_joy.parallel.communication import by_kind, stage_flows
from megatron_joy.parallel.gpus import Gpu
from megatron_joy.parallel.states import stage_states
from megatron_joy.parallel.steptime import Assumptions, StepTime, distinct_stages, step_time, update_time
from megatron_joy.recipe import Recipe
from megatron_joy.recipe.derive import nearest_split
from megatron_joy.recipe.schema import LayoutSection

DEGREES = {
    "tp": (1, 2, 4, 8),
    "pp": (1, 2, 4, 8, 16),
    "vpp": (1, 2, 4),
    "cp": (1, 2, 4, 8, 16),
    "ep": (1, 2, 4, 8, 16, 32, 64),
}
CONTEXT = 4096  # tokens of a row that a rank has at least: splitting shorter ones only adds communication
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Ranked:
    """A layout that fits, its update, and the fullest rank's memory in bytes."""

    recipe: Recipe
    time: StepTime
    memory: int
    mfu: float

    def as_json(self) -> dict[str, Any]:
        """Plain values; seconds, bytes."""
        layout = self.recipe.layout
        return {
            "tensor": layout.tensor_model_parallel_size,
            "pipeline": layout.pipeline_model_parallel_size,
            "virtual_pipeline": layout.virtual_pipeline_model_parallel_size,
            "context": layout.context_parallel_size,
            "expert": layout.expert_model_parallel_size,
            "data": layout.data_parallel_size,
            "recompute": self.recipe.train.recompute,
            "sequence_length": self.recipe.data.sequence_length,
            "memory": self.memory,
            "step_seconds": self.time.seconds,
            "tokens_per_second_per_gpu": self.time.tokens / self.time.seconds / layout.world_size,
            "mfu": self.mfu,
        }


def candidates(recipe: Recipe, gpus: int) -> Iterator[Recipe]:
    """Layouts that the model and the batch allow (as `recipe.validate` has it)."""
    model, batch = recipe.model, recipe.train.global_batch_size
    for tp, pp, vpp, cp, ep in product(*DEGREES.values()):
        copies, left = divmod(gpus, tp * pp * cp)
        if cp > max(1, recipe.data.sequence_length // CONTEXT) or ep * pp > gpus:
            continue
        if left or gpus % (ep * pp) or model.n_routed_experts % ep or pp * vpp > model.num_hidden_layers:
            continue
        if any(width % tp for width in (model.num_attention_heads, model.vocab_size, model.intermediate_size)):
            continue
        rows = recipe.train.micro_batch_size * copies
        if vpp > 1 and (pp == 1 or batch // rows % pp):  # interleaved chunks take micro-batches by PP at a time
            continue
        if batch % rows or recipe.data.sequence_length % (2 * cp * tp if cp > 1 else tp):
            continue
        layout = LayoutSection(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            data_parallel_size=copies,
            pipeline_layer_counts=nearest_split(model.num_hidden_layers, pp * vpp),
        )
        yield recipe.model_copy(update={"layout": layout})


def ranked(recipe: Recipe, gpus: int, gpu: Gpu, assumed: Assumptions, best: int) -> list[Ranked]:
    """The `best` layouts for a recipe of one sequence length, the quickest first; of equals the one with less memory.

    Raises UserError when no layout fits.
    """
    found: list[Ranked] = []
    smallest: int | None = None
    for each in candidates(recipe, gpus):
        states = {stage: stage_states(each, stage) for stage in distinct_stages(each)}
        at_end = None
        for recompute in RECOMPUTE:
            one = each.model_copy(update={"train": each.train.model_copy(update={"recompute": recompute})})
            memory = max(sum(stage_memory(one, stage, known).values()) for stage, known in states.items())
            smallest = memory if smallest is None else min(smallest, memory)
            if memory <= gpu.memory * (1 - SPARE):
                at_end = at_end or update_time(one, gpu, assumed)
                time = step_time(one, gpu, assumed, known=at_end)
                found.append(Ranked(one, time, memory, time.mfu(gpu, gpus)))
    if not found:
        length = recipe.data.sequence_length
        least = "no layout divides model and batch" if smallest is None else f"the smallest needs {smallest:,} bytes"
        raise UserError(f"--gpus {gpus}: no layout fits at sequence length {length}: {least}; give more GPUs")
    return sorted(found, key=lambda each: (each.time.seconds, each.memory))[:best]


def rankings(recipe: Recipe, gpus: int, gpu: Gpu, assumed: Assumptions, best: int) -> list[Ranked]:
    """For each sequence length of the run the `best` layouts."""
    return [one for form in forms(recipe) for one in ranked(form, gpus, gpu, assumed, best)]


def traffic(recipe: Recipe) -> list[Mapping[str, Any]]:
    """Bytes that one rank sends in an update, by sequence length, pipeline stage and kind."""
    stages = range(recipe.layout.pipeline_model_parallel_size)
    return [
        {"sequence_length": form.data.sequence_length, "stage": stage} | by_kind(stage_flows(form, stage))
        for form in forms(recipe)
        for stage in stages
    ]


def times(recipe: Recipe, gpu: Gpu, assumed: Assumptions) -> Sequence[tuple[Recipe, StepTime]]:
    """An update of each sequence length of the run."""
    return [(form, step_time(form, gpu, assumed)) for form in forms(recipe)]
