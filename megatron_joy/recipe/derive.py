"""What follows from other keys: the second of parse, derive, validate. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .fields import value_at, with_value
from .schema import Recipe


def equal_split(recipe: Recipe) -> list[int] | None:
    """Decoder layers of each pipeline chunk when all have the same; None where that doesn't divide."""
    chunks = recipe.layout.pipeline_chunks
    layers = recipe.model.num_hidden_layers
    return [layers // chunks] * chunks if layers % chunks == 0 else None


def nearest_split(layers: int, chunks: int) -> list[int]:
    """The most even split; the first chunks get the layer more, since the last one has the head and the MTP layer."""
    small, more = divmod(layers, chunks)
    return [small + (index < more) for index in range(chunks)]


def gradient_format(recipe: Recipe) -> str | None:
    """Fine groups need no wide exponent (DeepSeek-V3, section 3.3.2); a whole tensor's gradients do."""
    return {"off": None, "tensorwise": "hybrid", "delayed": "hybrid"}.get(recipe.precision.fp8.recipe, "e4m3")


def history_length(recipe: Recipe) -> int | None:
    """Transformer Engine's own; the newest amax needs no history."""
    fp8 = recipe.precision.fp8
    return None if fp8.recipe != "delayed" else 1 if fp8.amax_compute_algo == "most_recent" else 1024


DERIVED: dict[str, Callable[[Recipe], Any]] = {
    "layout.pipeline_layer_counts": equal_split,
    "precision.fp8.format": gradient_format,
    "precision.fp8.amax_history_len": history_length,
    "optimizer.muon_dtype": lambda recipe: recipe.precision.params_dtype,
    "run.folder": lambda recipe: f"runs/{recipe.name}",
}


def derive(recipe: Recipe) -> Recipe:
    """Fill in every key of DERIVED that is None."""
    for key, rule in DERIVED.items():
        if value_at(recipe, key) is None:
            recipe = with_value(recipe, key, rule(recipe))
    return recipe


@dataclass(frozen=True)
class Moot:
    """A key that has no effect when other keys (`causes`) have the values that `when` asks about.

    Given beside its cause it is refused for the reason `why`. Inherited (from a recipe that this one extends, or from
    the file when the cause is an override) it quietly goes back to its default: whoever changed the cause last knew
    nothing of it. With `why` empty only the second happens, because a rule of validate.py speaks for the first.
    """

    key: str
    causes: tuple[str, ...]
    when: Callable[[Recipe], bool]
    why: str = ""


OF_ONE_STAGE = ("peak_lr", "final_lr", "warmup_steps", "decay_steps", "decay_shape")
SPIKE_KEYS = ("spike_loss", "spike_grad_norm", "spike_window")
ROLLBACK_KEYS = ("spike_span", "max_rollbacks")
EVERY_SO_MANY = ("guards.recheck_interval", "guards.statistics_interval")
MUON_KEYS = ("momentum", "nesterov", "coefficients", "steps", "update_rms", "dtype")


def _after_the_run(key: str, recipe: Recipe) -> bool:
    """Whether what happens every so many updates has its first one after the last."""
    return value_at(recipe, key) > recipe.train.steps


# In this order: the pipeline's cuts look at VPP after VPP itself may have gone.
MOOT: tuple[Moot, ...] = (
    Moot(
        "model.mtp_loss_factor",
        ("model.num_nextn_predict_layers",),
        lambda recipe: recipe.model.num_nextn_predict_layers == 0,
        "there is no MTP layer",
    ),
    *(
        Moot(
            f"precision.fp8.{key}",
            ("precision.fp8.recipe",),
            lambda recipe: recipe.precision.fp8.recipe == "off",
            "no product is in FP8",
        )
        for key in ("format", "high_precision", "emulate")
    ),
    *(
        Moot(
            f"precision.fp8.{key}",
            ("precision.fp8.recipe",),
            lambda recipe: recipe.precision.fp8.recipe != "delayed",
            "only delayed scaling looks back",
        )
        for key in ("amax_history_len", "amax_compute_algo", "margin")
    ),
    Moot(
        "precision.fp8.amax_history_len",
        ("precision.fp8.amax_compute_algo",),
        lambda recipe: (
            recipe.precision.fp8.amax_compute_algo == "most_recent" and (recipe.precision.fp8.amax_history_len or 1) > 1
        ),
        "only the newest amax is looked at",
    ),
    Moot(
        "layout.virtual_pipeline_model_parallel_size",
        ("layout.pipeline_model_parallel_size",),
        lambda recipe: (
            recipe.layout.pipeline_model_parallel_size == 1 and recipe.layout.virtual_pipeline_model_parallel_size > 1
        ),
        "one pipeline stage has nothing to interleave",
    ),
    Moot(
        "layout.pipeline_layer_counts",
        (
            "layout.pipeline_model_parallel_size",
            "layout.virtual_pipeline_model_parallel_size",
            "model.num_hidden_layers",
        ),
        lambda recipe: not layer_counts_fit(recipe),
    ),
    *(
        Moot(
            f"run.notify.{key}",
            ("run.notify.command", "run.notify.webhook_env"),
            lambda recipe: not recipe.run.notify.wanted,
            "nobody is told",
        )
        for key in ("on", "timeout_seconds")
    ),
    Moot(
        "schedule.decay_shape",
        ("schedule.decay_steps",),
        lambda recipe: recipe.schedule.decay_steps == 0 and not recipe.stages,
        "the learning rate never decays",
    ),
    Moot(
        "schedule.final_lr",
        ("schedule.decay_steps",),
        lambda recipe: recipe.schedule.decay_steps == 0 and not recipe.stages,
        "the learning rate never decays",
    ),
    Moot(
        "train.validation_samples",
        ("train.validation_interval",),
        lambda recipe: recipe.train.validation_interval == 0,
        "there is no validation",
    ),
    Moot(
        "run.wandb_mode",
        ("run.wandb_project",),
        lambda recipe: recipe.run.wandb_project is None,
        "nothing is sent to Weights & Biases",
    ),
    Moot(
        "run.profile_ranks",
        ("run.profile_steps",),
        lambda recipe: recipe.run.profile_steps is None,
        "no step is profiled",
    ),
    Moot(
        "train.acceptance_passes",
        ("train.validation_interval", "model.num_nextn_predict_layers"),
        lambda recipe: recipe.train.validation_interval == 0 or recipe.model.num_nextn_predict_layers == 0,
        "drafts of the MTP layer are counted in validations",
    ),
    Moot(
        "data.validation",
        ("train.validation_interval",),
        lambda recipe: recipe.train.validation_interval == 0 and bool(recipe.data.validation),
        "there is no validation",
    ),
    *(
        Moot(
            f"checkpoint.{key}",
            ("checkpoint.interval",),
            lambda recipe: recipe.checkpoint.interval == 0,
            "no checkpoint is written in mid-run",
        )
        for key in ("asynchronous", "keep_every", "keep_best")
    ),
    Moot(
        "checkpoint.keep_best",
        ("train.validation_interval",),
        lambda recipe: recipe.train.validation_interval == 0 and recipe.checkpoint.keep_best > 0,
        "there is no validation",
    ),
    *(
        Moot(
            f"schedule.{key}",
            ("stages",),
            lambda recipe: bool(recipe.stages),
            "each stage has a learning rate of its own",
        )
        for key in OF_ONE_STAGE
    ),
    *(
        Moot(
            f"optimizer.muon_{key}",
            ("optimizer.name",),
            lambda recipe: recipe.optimizer.name != "muon",
            "no matrix is on Muon",
        )
        for key in MUON_KEYS
    ),
    *(
        Moot(
            f"guards.{key}",
            ("guards.spike",),
            lambda recipe: recipe.guards.spike == "off",
            "no spike is looked for",
        )
        for key in SPIKE_KEYS
    ),
    *(
        Moot(
            f"guards.{key}",
            ("guards.spike",),
            lambda recipe: recipe.guards.spike != "rollback",
            "the run never goes back",
        )
        for key in ROLLBACK_KEYS
    ),
    *(
        Moot(
            f"guards.{key}",
            ("guards.nonfinite", "guards.spike"),
            lambda recipe: recipe.guards.nonfinite == "stop" and recipe.guards.spike not in ("skip", "rollback"),
            "no update is left out",
        )
        for key in ("max_skipped_in_a_row", "max_skipped")
    ),
    *(Moot(key, ("train.steps",), partial(_after_the_run, key), "the run has fewer updates") for key in EVERY_SO_MANY),
    Moot(
        "guards.straggler_interval",
        ("layout.data_parallel_size",),
        lambda recipe: recipe.layout.world_size == 1,
        "one rank has no other to be slower than",
    ),
    Moot(
        "guards.straggler_factor",
        ("guards.straggler_interval",),
        lambda recipe: recipe.guards.straggler_interval == 0,
        "ranks are not compared",
    ),
)


def without_mtp(recipe: Recipe) -> Recipe:
    """Where there is no MTP layer the stages say nothing of one."""
    if recipe.model.num_nextn_predict_layers:
        return recipe
    return recipe.model_copy(
        update={"stages": [stage.model_copy(update={"mtp_loss_factor": None}) for stage in recipe.stages]}
    )


def layer_counts_fit(recipe: Recipe) -> bool:
    """Whether the given layer counts (if any) are those of this many chunks and layers."""
    counts = recipe.layout.pipeline_layer_counts
    if counts is None:
        return True
    return len(counts) == recipe.layout.pipeline_chunks and sum(counts) == recipe.model.num_hidden_layers
