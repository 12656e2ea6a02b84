"""A ladder of models for scaling laws: one recipe in several widths, everything else by constant rules."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_joy.errors import UserError

from .derive import nearest_split
from .load import load_recipe
from .schema import Recipe

STEP = 16  # widths are multiples of it: rows of whole 16 bytes, FP8's groups, even rotary pairs


@dataclass(frozen=True)
class Rules:
    """`lr_exponent`: rates go with width to this power. `tokens_per_parameter`: of parameters that a token uses."""

    tokens_per_parameter: float
    lr_exponent: float


def _multiple(value: float) -> int:
    return max(STEP, round(value / STEP) * STEP)


def _model(base: Recipe, width: int) -> dict[str, int]:
    """Depth, heads and all inner widths in proportion to the width; head widths, experts and top-k stay."""
    model, ratio = base.model, width / base.model.hidden_size
    wide = ("q_lora_rank", "kv_lora_rank", "intermediate_size", "moe_intermediate_size")
    return {
        "hidden_size": width,
        "num_hidden_layers": max(model.first_k_dense_replace + 1, round(model.num_hidden_layers * ratio)),
        "num_attention_heads": max(1, round(model.num_attention_heads * ratio)),
    } | {key: _multiple(getattr(model, key) * ratio) for key in wide}


def rung(name: str, overrides: Sequence[str], width: int, rules: Rules, active: Callable[[Recipe], int]) -> Recipe:
    """The recipe `name` with `overrides` at another width, for as many updates as its tokens take.

    active: parameters that a token uses. Raises UserError where the result is no valid recipe (a degree that doesn't
    divide the new heads, for instance).
    """
    base = load_recipe(name, overrides)
    model = _model(base, width)
    keys = [f"model.{key}={value}" for key, value in model.items()]
    chunks = base.layout.pipeline_chunks
    if chunks > 1:
        keys.append(f"layout.pipeline_layer_counts={nearest_split(model['num_hidden_layers'], chunks)}")
    sized = load_recipe(name, [*overrides, *keys])
    update = base.train.global_batch_size * base.data.sequence_length
    steps = max(1, -(-round(rules.tokens_per_parameter * active(sized)) // update))
    rate, share = (width / base.model.hidden_size) ** rules.lr_exponent, steps / base.train.steps
    schedule = base.schedule
    keys += [
        f"name={base.name}_w{width}",
        f"train.steps={steps}",
        f"schedule.peak_lr={schedule.peak_lr * rate!r}",
        f"schedule.warmup_steps={int(schedule.warmup_steps * share)}",
        f"schedule.decay_steps={int(schedule.decay_steps * share)}",
    ]
    if int(schedule.decay_steps * share):
        keys.append(f"schedule.final_lr={schedule.final_lr * rate!r}")
    return load_recipe(name, [*overrides, *keys])


def ladder(
    name: str, overrides: Sequence[str], widths: Sequence[int], rules: Rules, active: Callable[[Recipe], int]
) -> list[Recipe]:
    """A recipe for each width, small to large. Raises UserError for widths or bases that make no ladder."""
    base = load_recipe(name, overrides)
    if base.stages:
        raise UserError(f"{name}: has [[stages]], and a ladder has one schedule; take a recipe without them")
    if base.run.folder != f"runs/{base.name}":
        raise UserError(f"run.folder = {base.run.folder}: all models would train there; leave it out")
    wrong = [width for width in widths if width <= 0 or width % STEP]
    if wrong or len(set(widths)) < len(widths) or not widths:
        near = sorted({_multiple(width) for width in widths}) or [base.model.hidden_size]
        raise UserError(
            f"--widths {','.join(map(str, widths))}: must be different multiples of {STEP}; "
            f"try --widths {','.join(map(str, near))}"
        )
    return [rung(name, overrides, width, rules, active) for width in sorted(widths)]
