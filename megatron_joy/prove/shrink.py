"""A recipe in small: widths shrunk by one rule, layers, pipeline cuts, experts and degrees as they are. Without torch.

Each width goes to the least multiple of what the layout needs of it that is not below its floor in `FLOORS`; none
grows. Degrees are touched only when the layout has more processes than may run: replicas (DP) first, then the largest
of EP, CP, TP and PP, by its smallest prime factor, until it fits. Experts are halved only when there are more than a
machine holds. Whatever differs from the recipe is listed, key by key.
"""

import math
from dataclasses import dataclass
from typing import Any

from megatron_joy.recipe.derive import equal_split
from megatron_joy.recipe.fields import value_at
from megatron_joy.recipe.fp8_rules import FP8_WIDTHS
from megatron_joy.recipe.schema import (
    CheckpointSection,
    LayoutSection,
    PrecisionSection,
    Recipe,
    RunSection,
    ScheduleSection,
)
from megatron_joy.recipe.validate import validate

FLOORS = {
    "num_attention_heads": 2,
    "hidden_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "vocab_size": 128,
}
SEQUENCE_FLOOR = 64
MOST_EXPERT_WEIGHTS = 32_000_000  # 0.5 GB with gradients and optimizer state in one process
SPLIT = 8  # least width of a rank's share of a matrix; grouped products want rows of 16 bytes
SHRINKING_KEYS = ("expert_model_parallel_size", "context_parallel_size", "tensor_model_parallel_size")


@dataclass(frozen=True)
class Change:
    """A key of the recipe that the small recipe has otherwise, and why."""

    key: str
    was: Any
    now: Any
    why: str


@dataclass(frozen=True)
class Shrunk:
    """The recipe to run and what it changes of the given one."""

    recipe: Recipe
    changes: tuple[Change, ...]

    @property
    def reduced(self) -> tuple[Change, ...]:
        """Changes that make the proof weaker than the recipe's layout: degrees and experts, not widths."""
        return tuple(change for change in self.changes if change.why not in (WIDTH, SHORT))


WIDTH = "width"
SHORT = "a short run"
LEAST_EPSILON = 1e-6
TOO_MANY = "fewer processes"
TOO_HEAVY = "too many expert weights for a small run"


def shrink(recipe: Recipe, processes: int, steps: int, own_precision: bool = False) -> Shrunk:
    """The small recipe for at most `processes` processes and a run of `steps` steps, in fp32 or in its own precision.

    FP8 is emulated, and widths are then multiples of what its products want of a rank's matrices.
    Raises RuntimeError if the result breaks a rule of recipes (a bug here: any valid recipe can be shrunk).
    """
    layout = fit_world(recipe.layout, processes, recipe.model.num_hidden_layers)
    small = recipe.model_copy(update={"layout": layout, "precision": _precision(recipe, own_precision)})
    small = small.model_copy(update={"model": _model(small)})
    small = small.model_copy(update={"data": _data(small)})
    small = small.model_copy(update={"train": _train(small, steps), "schedule": _schedule(small, steps)})
    small = small.model_copy(update={"stages": []})
    small = small.model_copy(
        update={
            "optimizer": _optimizer(small, own_precision),
            "checkpoint": CheckpointSection(),
            "run": RunSection(folder="unused"),
        }
    )
    problems = validate(small, given={})
    if problems:
        raise RuntimeError("the shrunk recipe is not sound: " + "; ".join(problems))
    return Shrunk(small, tuple(_changes(recipe, small)))


def fit_world(layout: LayoutSection, processes: int, layers: int) -> LayoutSection:
    """The layout with degrees reduced until its world is at most `processes` (at least 1)."""
    while layout.world_size > processes:
        layout = _fewer_replicas(layout, processes) or _smaller_degree(layout, layers)
    return layout


def _holds_experts(layout: LayoutSection) -> bool:
    return layout.world_size % layout.expert_model_parallel_world == 0


def _fewer_replicas(layout: LayoutSection, processes: int) -> LayoutSection | None:
    """The largest smaller DP that fits, else the smallest one; None when experts or nothing to take away forbid it."""
    degree = layout.data_parallel_size
    smaller = [
        made
        for replicas in range(degree - 1, 0, -1)
        if degree % replicas == 0 and _holds_experts(made := layout.model_copy(update={"data_parallel_size": replicas}))
    ]
    fitting = [made for made in smaller if made.world_size <= processes]
    return next(iter(fitting or smaller[-1:]), None)


def _smallest_prime(number: int) -> int:
    return next(p for p in range(2, number + 1) if number % p == 0)


def _smaller_degree(layout: LayoutSection, layers: int) -> LayoutSection:
    # ETP comes last: it takes no ranks of its own, but replicas that hold its parts can't go before it does.
    keys = (*SHRINKING_KEYS, "pipeline_model_parallel_size", "expert_tensor_parallel_size")
    key = max(keys, key=lambda key: getattr(layout, key))
    degree = getattr(layout, key)
    factor = _smallest_prime(degree)
    update: dict[str, Any] = {key: degree // factor}
    if key == "pipeline_model_parallel_size":
        update |= _fewer_stages(layout, factor, layers)
    made = layout.model_copy(update=update)
    # Experts must still fit into the world, which may have become smaller than their share of it.
    for name in ("expert_tensor_parallel_size", "expert_model_parallel_size"):
        while not _holds_experts(made) and getattr(made, name) > 1:
            share = getattr(made, name)
            made = made.model_copy(update={name: share // _smallest_prime(share)})
    return made


def _fewer_stages(layout: LayoutSection, factor: int, layers: int) -> dict[str, Any]:
    """Neighbouring chunks become one; a single stage has no chunks."""
    counts = layout.pipeline_layer_counts or [layers // layout.pipeline_chunks] * layout.pipeline_chunks
    if layout.pipeline_model_parallel_size == factor:
        return {"pipeline_layer_counts": [layers], "virtual_pipeline_model_parallel_size": 1}
    return {"pipeline_layer_counts": [sum(counts[i : i + factor]) for i in range(0, len(counts), factor)]}


def _least(width: int, floor: int, step: int) -> int:
    """The least multiple of `step` from `floor` on, or the width itself where that is not smaller."""
    return min(width, -(-floor // step) * step)


def _precision(recipe: Recipe, own: bool) -> PrecisionSection:
    precision = recipe.precision
    if not own:
        return PrecisionSection(params_dtype="fp32")
    if precision.fp8.recipe == "off":
        return precision
    return precision.model_copy(update={"fp8": precision.fp8.model_copy(update={"emulate": True})})


def _steps(recipe: Recipe) -> dict[str, int]:
    """What each width must be a multiple of, so that every rank has a whole share."""
    layout = recipe.layout
    tensor = layout.tensor_model_parallel_size
    expert = math.lcm(tensor, layout.expert_tensor_parallel_size)
    steps = dict.fromkeys(FLOORS, 1) | {
        "num_attention_heads": tensor,
        "hidden_size": math.lcm(tensor, SPLIT),
        "intermediate_size": tensor * SPLIT,
        "moe_intermediate_size": expert * SPLIT,
        "vocab_size": tensor * SPLIT,
    }
    if recipe.precision.fp8.recipe == "off":
        return steps
    group = FP8_WIDTHS[recipe.precision.fp8.recipe]
    heads = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    split = {"hidden_size": tensor, "intermediate_size": tensor, "moe_intermediate_size": expert}
    return steps | dict.fromkeys(heads, group) | {key: group * ranks for key, ranks in split.items()}


def _model(recipe: Recipe) -> Any:
    model, steps = recipe.model, _steps(recipe)
    update: dict[str, Any] = {key: _least(getattr(model, key), floor, steps[key]) for key, floor in FLOORS.items()}
    # Activations keep the size that they have at full width.
    growth = math.sqrt(model.hidden_size / update["hidden_size"])
    update["initializer_range"] = model.initializer_range * growth
    update["n_routed_experts"] = _experts(recipe, update["hidden_size"] * update["moe_intermediate_size"])
    update["backend"] = "portable"
    return model.model_copy(update=update)


def _experts(recipe: Recipe, matrix: int) -> int:
    """As many of the experts as a small run holds; `matrix` is the size of one of an expert's three matrices."""
    model, degree = recipe.model, recipe.layout.expert_model_parallel_size
    experts = model.n_routed_experts
    layers = model.num_hidden_layers - model.first_k_dense_replace
    while 3 * matrix * layers * experts > MOST_EXPERT_WEIGHTS:
        fewer = experts // 2
        if experts % 2 or fewer % degree or fewer < model.num_experts_per_tok:
            break
        experts = fewer
    return experts


def _data(recipe: Recipe) -> Any:
    layout, data = recipe.layout, recipe.data
    step = 2 * layout.context_parallel_size * layout.tensor_model_parallel_size
    length = _least(data.sequence_length, SEQUENCE_FLOOR, step)
    return data.model_copy(update={"sequence_length": length, "train": [], "validation": []})


def _train(recipe: Recipe, steps: int) -> Any:
    """A global batch of a few micro-batches for each rank, so that accumulation and pipelining have work."""
    layout, train = recipe.layout, recipe.train
    samples = min(train.micro_batch_size, 2)
    micro_batches = 2 * layout.pipeline_model_parallel_size
    return train.model_copy(
        update={
            "steps": steps,
            "micro_batch_size": samples,
            "global_batch_size": samples * micro_batches * layout.data_parallel_size,
            "validation_interval": 0,
            "threads": 1,
        }
    )


def _optimizer(recipe: Recipe, own_precision: bool) -> Any:
    """In fp32 where the rest is, and with an epsilon above the rounding of small gradients.

    bf16 in Newton-Schulz makes a rounding error of the gradient one of the update's size. So does AdamW where an
    element's gradient is itself rounding (the embeddings of rare tokens, near 1e-9): it divides by its size.
    """
    changes: dict[str, Any] = {"eps": max(recipe.optimizer.eps, LEAST_EPSILON)}
    if recipe.optimizer.name == "muon" and not own_precision:
        changes["muon_dtype"] = "fp32"
    return recipe.optimizer.model_copy(update=changes)


def _schedule(recipe: Recipe, steps: int) -> Any:
    """Warm-up and decay inside the short run, where the recipe has them; of stages the highest rate."""
    if recipe.stages:
        rates = [rate for stage in recipe.stages for rate in (stage.start_lr, stage.end_lr) if rate]
        return ScheduleSection(peak_lr=max(rates), final_lr=min(rates), warmup_steps=steps // 4, decay_steps=steps // 4)
    schedule = recipe.schedule
    warmup, decay = min(schedule.warmup_steps, steps // 4), min(schedule.decay_steps, steps // 4)
    return schedule.model_copy(update={"warmup_steps": warmup, "decay_steps": decay})


COMPARED: dict[str, str] = {
    **{f"layout.{key}": TOO_MANY for key in LayoutSection.model_fields},
    "model.n_routed_experts": TOO_HEAVY,
    **{f"model.{key}": WIDTH for key in (*FLOORS, "initializer_range")},
    "data.sequence_length": WIDTH,
    "train.global_batch_size": SHORT,
    "train.micro_batch_size": SHORT,
    "train.steps": SHORT,
    "schedule.warmup_steps": SHORT,
    "schedule.decay_steps": SHORT,
    "precision.params_dtype": SHORT,
    "precision.fp8.recipe": SHORT,
    "precision.fp8.emulate": SHORT,
    "optimizer.muon_dtype": SHORT,
    "optimizer.eps": SHORT,
}


def _changes(recipe: Recipe, small: Recipe) -> list[Change]:
    return [
        Change(key, value_at(recipe, key), value_at(small, key), why)
        for key, why in COMPARED.items()
        if value_at(recipe, key) != value_at(small, key)
    ] + ([Change("stages", [stage.name for stage in recipe.stages], [], SHORT)] if recipe.stages else [])


def in_fp32(recipe: Recipe) -> Recipe:
    """The same small recipe without the rounding of its number format."""
    update: dict[str, Any] = {"precision": PrecisionSection(params_dtype="fp32")}
    if recipe.optimizer.name == "muon":
        update["optimizer"] = recipe.optimizer.model_copy(update={"muon_dtype": "fp32"})
    return recipe.model_copy(update=update)


def one_process(recipe: Recipe) -> Recipe:
    """The same model, samples and updates in one process: the reference.

    A whole step is one micro-batch and nothing is recomputed: neither may change what is computed.
    """
    train = recipe.train.model_copy(update={"micro_batch_size": recipe.train.global_batch_size, "recompute": "none"})
    alone = recipe.model_copy(update={"layout": LayoutSection(), "train": train})
    layout = alone.layout.model_copy(update={"pipeline_layer_counts": equal_split(alone)})
    return alone.model_copy(update={"layout": layout})
