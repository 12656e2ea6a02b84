"""The rules between keys: the third of parse, derive, validate. One row of RULES is one rule.

A rule gives None when it holds, else what is wrong with the numbers that were found, the rule, and one fix.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .derive import MOOT, layer_counts_fit, nearest_split
from .dump import format_value
from .fields import value_at
from .fp8_rules import fp8_backend, fp8_parts, fp8_recompute, fp8_widths
from .guard_rules import (
    rollback_needs_checkpoints,
    rollback_reaches_back,
    spike_signals,
    spike_window_is_reached,
)
from .schema import Recipe, SourceEntry
from .stage_rules import stage_problems, stage_views, sum_problem

OF_TIMETABLE = ("stages", "schedule", "train", "data", "model")
ALIGNED = 8  # values: 16 bytes in bf16, which grouped matrix products want of every row


@dataclass(frozen=True)
class Rule:
    """A relation between keys; it is not asked when one of its keys has no valid value."""

    keys: tuple[str, ...]
    check: Callable[[Recipe], str | None]


def nearest_multiple(value: int, step: int) -> int:
    """The positive multiple of `step` nearest to `value`, the larger one of two equally near."""
    return max(step, (value + step // 2) // step * step)


def nearest_divisor(value: int, of: int) -> int:
    """The divisor of `of` nearest to `value`, the smaller one of two equally near (found in root of `of` steps)."""
    small = [number for number in range(1, int(of**0.5) + 1) if of % number == 0]
    return min({*small, *(of // number for number in small)}, key=lambda number: (abs(number - value), number))


def _given(recipe: Recipe, *keys: str) -> str:
    return " and ".join(f"{key} = {format_value(value_at(recipe, key))}" for key in keys)


def at_most(key: str, limit: str) -> Rule:
    """`key` must not exceed `limit`."""

    def check(recipe: Recipe) -> str | None:
        if value_at(recipe, key) <= value_at(recipe, limit):
            return None
        bound = format_value(value_at(recipe, limit))
        return f"{_given(recipe, key)}: must be at most {limit} = {bound}; set {key} = {bound}"

    return Rule((key, limit), check)


def _tensor_parallel(recipe: Recipe) -> str | None:
    """Everything that TP ranks share out must divide; all that doesn't is one line, since one degree is to blame."""
    model, layout = recipe.model, recipe.layout
    degree = layout.tensor_model_parallel_size
    widths = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.hidden_size": model.hidden_size,
        "model.intermediate_size": model.intermediate_size,
        "model.moe_intermediate_size x model.n_shared_experts": model.moe_intermediate_size * model.n_shared_experts,
        "model.vocab_size": model.vocab_size,
    }
    uneven = [name for name, width in widths.items() if width % degree]
    if not uneven:
        return None
    if uneven == ["model.vocab_size"]:
        fix = f"pad the vocabulary to the next multiple, model.vocab_size = {-(-model.vocab_size // degree) * degree}"
    else:
        fix = f"set layout.tensor_model_parallel_size = {nearest_divisor(degree, math.gcd(*widths.values()))}"
    listed = ", ".join(f"{name} = {widths[name]}" for name in uneven)
    return f"layout.tensor_model_parallel_size = {degree}: must divide {listed}; {fix}"


def _expert_tensor_parallel(recipe: Recipe) -> str | None:
    width, layout = recipe.model.moe_intermediate_size, recipe.layout
    degree = layout.expert_tensor_parallel_size
    if width % degree == 0:
        return None
    ranks = max(1, layout.world_size // (layout.expert_model_parallel_size * layout.pipeline_model_parallel_size))
    return (
        f"layout.expert_tensor_parallel_size = {degree}: must divide model.moe_intermediate_size = {width}; "
        f"set layout.expert_tensor_parallel_size = {nearest_divisor(degree, math.gcd(max(width // ALIGNED, 1), ranks))}"
    )


def _expert_parallel(recipe: Recipe) -> str | None:
    """EP shares out the experts, and EP x ETP x PP ranks hold them all: the world must be a multiple of that."""
    layout, experts = recipe.layout, recipe.model.n_routed_experts
    degree, world, holders = layout.expert_model_parallel_size, layout.world_size, layout.expert_model_parallel_world
    others = layout.expert_tensor_parallel_size * layout.pipeline_model_parallel_size
    wrong = []
    if experts % degree:
        wrong.append(f"must divide model.n_routed_experts = {experts}")
    if world % holders:
        wrong.append(
            f"EP x ETP x PP = {degree} x {layout.expert_tensor_parallel_size} x {layout.pipeline_model_parallel_size} "
            f"= {holders} must divide the world size, TP x CP x PP x DP = {layout.tensor_model_parallel_size} x "
            f"{layout.context_parallel_size} x {layout.pipeline_model_parallel_size} x {layout.data_parallel_size} = "
            f"{world}"
        )
    if not wrong:
        return None
    if world % others == 0:
        fix = f"layout.expert_model_parallel_size = {nearest_divisor(degree, math.gcd(experts, world // others))}"
    else:
        step = holders // math.gcd(holders, layout.model_parallel_size)
        fix = f"layout.data_parallel_size = {-(-layout.data_parallel_size // step) * step}"
    return f"layout.expert_model_parallel_size = {degree}: {' and '.join(wrong)}; set {fix}"


def _rope(recipe: Recipe) -> str | None:
    width = recipe.model.qk_rope_head_dim
    if width % 2 == 0:
        return None
    return f"model.qk_rope_head_dim = {width}: rotary position turns pairs, so it must be even; set {width + 1}"


def _some_experts(recipe: Recipe) -> str | None:
    dense, layers = recipe.model.first_k_dense_replace, recipe.model.num_hidden_layers
    if dense < layers:
        return None
    return (
        f"model.first_k_dense_replace = {dense}: must be below model.num_hidden_layers = {layers}, so that a MoE layer "
        f"is left; set model.first_k_dense_replace = {max(layers - 1, 0)}"
    )


def _aligned_rows(recipe: Recipe) -> str | None:
    degree = recipe.layout.expert_tensor_parallel_size
    rows = {
        "model.hidden_size": (recipe.model.hidden_size, ALIGNED),
        "model.moe_intermediate_size": (recipe.model.moe_intermediate_size, ALIGNED * degree),
    }
    # A width that the degree doesn't divide has a rule of its own.
    wrong = {
        key: (value, step) for key, (value, step) in rows.items() if value % step and not value % (step // ALIGNED)
    }
    if not wrong:
        return None
    key, (value, step) = next(iter(wrong.items()))
    return (
        f"{key} = {value}: must be a multiple of {step}, since the experts' grouped matrix products want rows of whole "
        f"16 bytes on each rank; set {key} = {nearest_multiple(value, step)}"
    )


def _pipeline_cuts(recipe: Recipe) -> str | None:
    layers, chunks, counts = recipe.model.num_hidden_layers, recipe.layout.pipeline_chunks, _counts(recipe)
    stages = (
        f"PP x VPP = {recipe.layout.pipeline_model_parallel_size} x "
        f"{recipe.layout.virtual_pipeline_model_parallel_size} = {chunks}"
    )
    if layers < chunks:
        return f"model.num_hidden_layers = {layers}: too few for {stages} pipeline chunks; set at most {layers} chunks"
    fix = f"set layout.pipeline_layer_counts = {nearest_split(layers, chunks)}"
    if counts is None:
        return f"model.num_hidden_layers = {layers}: does not divide into {stages} equal pipeline chunks; {fix}"
    if layer_counts_fit(recipe):
        return None
    return (
        f"layout.pipeline_layer_counts = {counts}: must be {stages} numbers that add up to model.num_hidden_layers = "
        f"{layers} (found {len(counts)} adding up to {sum(counts)}); {fix}"
    )


def _counts(recipe: Recipe) -> list[int] | None:
    return recipe.layout.pipeline_layer_counts


def _context(recipe: Recipe) -> str | None:
    length, context = recipe.data.sequence_length, recipe.layout.context_parallel_size
    if context == 1 or length % (2 * context) == 0:
        return None
    return (
        f"data.sequence_length = {length}: must be a multiple of 2 x CP = 2 x {context} = {2 * context}, a chunk from "
        f"the front and one from the back for each rank; set data.sequence_length = "
        f"{nearest_multiple(length, 2 * context)}"
    )


def _sequence_shards(recipe: Recipe) -> str | None:
    layout, length, samples = recipe.layout, recipe.data.sequence_length, recipe.train.micro_batch_size
    tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
    # A degree that doesn't suit the model is told by its own rule; a sequence to suit it would be no fix.
    told = recipe.model.num_attention_heads % tensor != 0
    if tensor == 1 or told or samples * length % (context * tensor) == 0:
        return None
    return (
        f"data.sequence_length = {length}: train.micro_batch_size x data.sequence_length / CP = {samples} x {length} / "
        f"{context} tokens must divide over layout.tensor_model_parallel_size = {tensor} (sequence parallelism); "
        f"set data.sequence_length = {nearest_multiple(length, context * tensor)}"
    )


def _batch(recipe: Recipe) -> str | None:
    batch, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    replicas = recipe.layout.data_parallel_size
    if batch % (micro * replicas) == 0:
        return None
    return (
        f"train.global_batch_size = {batch}: must be a multiple of train.micro_batch_size x layout.data_parallel_size "
        f"= {micro} x {replicas} = {micro * replicas}; set train.global_batch_size = "
        f"{nearest_multiple(batch, micro * replicas)}"
    )


def _interleaving(recipe: Recipe) -> str | None:
    layout, train = recipe.layout, recipe.train
    stages, step = layout.pipeline_model_parallel_size, train.micro_batch_size * layout.data_parallel_size
    micro_batches = train.global_batch_size // step
    # Without interleaving any number works; a batch that doesn't divide is another rule's to tell.
    uneven = layout.virtual_pipeline_model_parallel_size > 1 and micro_batches % stages
    if not uneven or train.global_batch_size % step:
        return None
    return (
        f"train.global_batch_size = {train.global_batch_size}: gives each rank {micro_batches} micro-batches, and with "
        f"layout.virtual_pipeline_model_parallel_size = {layout.virtual_pipeline_model_parallel_size} they must be a "
        f"multiple of PP = {stages}; set train.global_batch_size = "
        f"{nearest_multiple(train.global_batch_size, step * stages)}"
    )


def _schedule(recipe: Recipe) -> str | None:
    warmup, decay, steps = recipe.schedule.warmup_steps, recipe.schedule.decay_steps, recipe.train.steps
    if warmup + decay <= steps:
        return None
    return (
        f"schedule.warmup_steps + schedule.decay_steps = {warmup} + {decay} = {warmup + decay}: must be at most "
        f"train.steps = {steps}; set train.steps = {warmup + decay}"
    )


def _learning_rates(recipe: Recipe) -> str | None:
    final, peak = recipe.schedule.final_lr, recipe.schedule.peak_lr
    if recipe.schedule.decay_steps == 0 or final <= peak:
        return None
    return (
        f"schedule.final_lr = {final}: must be at most schedule.peak_lr = {peak}, a decay goes down; "
        f"set schedule.final_lr = {peak / 10:g}"
    )


def _validation_data(recipe: Recipe) -> str | None:
    interval = recipe.train.validation_interval
    if interval == 0 or recipe.data.validation:
        return None
    return (
        f"train.validation_interval = {interval}: data.validation names no data to validate on; "
        f'set data.validation = [{{manifest = "DIR/validation"}}] or train.validation_interval = 0'
    )


def _validation_batch(recipe: Recipe) -> str | None:
    """Interleaved pipeline chunks take as many micro-batches at a time as there are stages, in validation too."""
    layout = recipe.layout
    samples, micro = recipe.train.validation_samples, recipe.train.micro_batch_size
    stages = layout.pipeline_model_parallel_size if layout.virtual_pipeline_model_parallel_size > 1 else 1
    step = micro * layout.data_parallel_size * stages
    if recipe.train.validation_interval == 0 or samples % step == 0:
        return None
    and_stages = (f" x PP (with VPP {layout.virtual_pipeline_model_parallel_size})", f" x {stages}")
    named, number = and_stages if stages > 1 else ("", "")
    return (
        f"train.validation_samples = {samples}: must be a multiple of train.micro_batch_size x "
        f"layout.data_parallel_size{named} = {micro} x {layout.data_parallel_size}{number} = {step}; set "
        f"train.validation_samples = {nearest_multiple(samples, step)}"
    )


def _keep_every(recipe: Recipe) -> str | None:
    every, interval = recipe.checkpoint.keep_every, recipe.checkpoint.interval
    if every == 0 or interval == 0 or every % interval == 0:
        return None
    return (
        f"checkpoint.keep_every = {every}: must be a multiple of checkpoint.interval = {interval}, other steps have no "
        f"checkpoint; set checkpoint.keep_every = {nearest_multiple(every, interval)}"
    )


def _keep_best(recipe: Recipe) -> str | None:
    best, interval, validation = (
        recipe.checkpoint.keep_best,
        recipe.checkpoint.interval,
        recipe.train.validation_interval,
    )
    if best == 0 or interval == 0 or validation == 0 or interval % validation == 0:
        return None
    return (
        f"checkpoint.interval = {interval}: must be a multiple of train.validation_interval = {validation}, since "
        f"checkpoint.keep_best = {best} judges checkpoints by their validation loss; set checkpoint.interval = "
        f"{nearest_multiple(interval, validation)}"
    )


def _moments(recipe: Recipe) -> str | None:
    if recipe.optimizer.moments_dtype == "fp32" or recipe.optimizer.name == "adamw":
        return None
    return (
        f"optimizer.moments_dtype = {format_value(recipe.optimizer.moments_dtype)}: with optimizer.name = "
        f'{format_value(recipe.optimizer.name)} all state is fp32; set optimizer.moments_dtype = "fp32"'
    )


def _profile(recipe: Recipe) -> str | None:
    window, ranks, steps = recipe.run.profile_steps, recipe.run.profile_ranks, recipe.train.steps
    if window is None:
        return None
    first, last = window
    if not first <= last <= steps:
        fix = [min(first, last, steps), min(max(first, last), steps)]
        return (
            f"run.profile_steps = {[first, last]}: must be the first and the last step of a window inside "
            f"train.steps = {steps}; set run.profile_steps = {fix}"
        )
    world = recipe.layout.world_size
    if not ranks or max(ranks) >= world:
        return (
            f"run.profile_ranks = {ranks}: must be ranks of the layout's {world}, 0 to {world - 1}; "
            "set run.profile_ranks = [0]"
        )
    return None


def blend_problem(key: str, sources: list[SourceEntry]) -> str | None:
    """A blend with one source has no shares to give, and a source belongs in it once."""
    if len(sources) == 1 and sources[0].weight != 1.0:
        return f"{key}.0.weight = {sources[0].weight}: has no effect, it is the only source; leave weight out"
    seen: dict[str, int] = {}
    for index, source in enumerate(sources):
        if (first := seen.setdefault(source.manifest.rstrip("/"), index)) != index:
            total = sources[first].weight + source.weight
            return (
                f"{key}.{index}.manifest = {format_value(source.manifest)}: is already {key}.{first}; "
                f"keep one with weight = {total:g}"
            )
    return None


def _validation_caps(recipe: Recipe) -> str | None:
    for index, source in enumerate(recipe.data.validation):
        if source.max_epochs is not None:
            key = f"data.validation.{index}.max_epochs = {source.max_epochs:g}"
            return f"{key}: has no effect, every validation reads the same samples; leave it out"
    return None


RULES: tuple[Rule, ...] = (
    Rule(
        (
            "layout.tensor_model_parallel_size",
            "model.num_attention_heads",
            "model.hidden_size",
            "model.intermediate_size",
            "model.moe_intermediate_size",
            "model.n_shared_experts",
            "model.vocab_size",
        ),
        _tensor_parallel,
    ),
    Rule(("layout.expert_tensor_parallel_size", "model.moe_intermediate_size"), _expert_tensor_parallel),
    Rule(("layout", "model.n_routed_experts"), _expert_parallel),
    at_most("model.num_experts_per_tok", "model.n_routed_experts"),
    at_most("data.sequence_length", "model.max_position_embeddings"),
    Rule(("model.qk_rope_head_dim",), _rope),
    Rule(("model.first_k_dense_replace", "model.num_hidden_layers"), _some_experts),
    Rule(("layout.expert_tensor_parallel_size", "model.hidden_size", "model.moe_intermediate_size"), _aligned_rows),
    Rule(("layout", "model.num_hidden_layers"), _pipeline_cuts),
    Rule(("precision.fp8", "layout", "model"), fp8_widths),
    Rule(("precision.fp8",), fp8_parts),
    Rule(("precision.fp8.emulate", "model.backend"), fp8_backend),
    Rule(("precision.fp8", "train.recompute"), fp8_recompute),
    Rule(("optimizer.name", "optimizer.moments_dtype"), _moments),
    Rule(("layout.context_parallel_size", "data.sequence_length"), _context),
    Rule(("layout", "data.sequence_length", "train.micro_batch_size", "model.num_attention_heads"), _sequence_shards),
    Rule(("layout.data_parallel_size", "train.global_batch_size", "train.micro_batch_size"), _batch),
    Rule(("layout", "train.global_batch_size", "train.micro_batch_size"), _interleaving),
    Rule(("schedule.warmup_steps", "schedule.decay_steps", "train.steps", "stages"), _schedule),
    Rule(("schedule.final_lr", "schedule.peak_lr", "schedule.decay_steps", "stages"), _learning_rates),
    Rule(("train.validation_interval", "data.validation"), _validation_data),
    Rule(
        (
            "train.validation_interval",
            "train.validation_samples",
            "train.micro_batch_size",
            "layout",
        ),
        _validation_batch,
    ),
    Rule(("guards.spike", "guards.spike_loss", "guards.spike_grad_norm"), spike_signals),
    Rule(("guards.spike", "checkpoint.interval", "train.steps"), rollback_needs_checkpoints),
    Rule(("guards.spike", "guards.spike_window", *OF_TIMETABLE), spike_window_is_reached),
    Rule(("guards.spike", "guards.spike_span", "checkpoint"), rollback_reaches_back),
    Rule(("checkpoint.keep_every", "checkpoint.interval"), _keep_every),
    Rule(("checkpoint.keep_best", "checkpoint.interval", "train.validation_interval"), _keep_best),
    Rule(("run.profile_steps", "run.profile_ranks", "train.steps", "layout"), _profile),
    Rule(("data.train",), lambda recipe: blend_problem("data.train", recipe.data.train)),
    Rule(("data.validation",), lambda recipe: blend_problem("data.validation", recipe.data.validation)),
    Rule(("data.validation",), _validation_caps),
)


STAGE_KEYS = {"data.sequence_length", "train.global_batch_size"}
OF_STAGES = ("stages", "data.train", "train", "model", "layout", *STAGE_KEYS)


def touches(key: str, broken: frozenset[str]) -> bool:
    """Whether a key, or something in or around it, is among the broken ones."""
    return any(key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in broken)


def _moot_problems(recipe: Recipe, given: Mapping[str, int], broken: frozenset[str]) -> list[str]:
    problems = []
    for moot in MOOT:
        sound = not any(touches(key, broken) for key in (moot.key, *moot.causes))
        if moot.why and moot.key in given and sound and moot.when(recipe):
            causes = "[[stages]]" if moot.causes == ("stages",) else _given(recipe, *moot.causes)
            problems.append(f"{_given(recipe, moot.key)}: has no effect with {causes}, {moot.why}; leave it out")
    return problems


def validate(recipe: Recipe, given: Mapping[str, int], broken: frozenset[str] = frozenset()) -> list[str]:
    """All problems between the keys of a derived recipe, in the order of RULES; none means that it is sound.

    given: the keys that somebody wrote (see `load.Parsed`). broken: keys whose own value is already known to be wrong.
    """
    asked = [rule for rule in RULES if not any(touches(key, broken) for key in rule.keys)]
    found = [rule.check(recipe) for rule in asked]
    problems = [problem for problem in found if problem is not None]
    problems += [problem for problem in _of_stages(recipe, asked) if problem not in problems]
    if not any(touches(key, broken) for key in OF_STAGES):
        problems += stage_problems(recipe)
        problems += sum_problem(recipe) if recipe.stages and not problems else []
    elif broken == {"train.steps"} and recipe.stages and not problems and not stage_problems(recipe):
        problems += sum_problem(recipe, known=False)  # the number that is missing, or none, can be told
    return problems + _moot_problems(recipe, given, broken)


def _of_stages(recipe: Recipe, rules: Sequence[Rule]) -> list[str]:
    """What the rules about length and batch say of each stage, in the stage's own keys; each thing once."""
    found: dict[str, None] = {}
    for view, names in stage_views(recipe):
        for rule in rules:
            if STAGE_KEYS & set(rule.keys) and (problem := rule.check(view)) is not None:
                for key, own in names.items():
                    problem = problem.replace(key, own)
                found[problem] = None
    return list(found)
