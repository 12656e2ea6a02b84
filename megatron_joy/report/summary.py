"""The headline of a run: a dozen numbers and what a reader should know before looking at any curve."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_joy.report.attempts import Outcome
from megatron_joy.report.metrics import Metrics
from megatron_joy.report.parameters import ParameterCounts, count_parameters
from megatron_joy.report.reference import unigram_entropy
from megatron_joy.report.runlog import RunLog

RECENT_ROWS = 100
"""Rows that "recent" means for the throughput."""
MEMORY = ("parameters", "gradients", "optimizer", "peak")


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What `joy report --json` prints. Losses in nats per token, times in seconds; None where the run has no such row.

    Attributes:
        steps_done: completed steps of the newest attempt; `steps_planned` is the recipe's.
        validation_mtp_loss, mtp_acceptance_length: of the last validation that has them: the MTP layer's loss, and
            tokens that a pass gives with its drafts.
        best_validation_loss: the lowest of the run, at `best_validation_step`.
        tokens_per_second, mfu: medians of the last RECENT_ROWS rows.
        memory: bytes by kind on the rank that has most, of the newest row that says.
        active_seconds: sum of the attempts' lengths; `elapsed_seconds` runs from first start to last sign of life.
        kills: attempts that ended without a word; `lost_steps` were run more than once because of resumes.
        nonfinite_steps: steps whose loss was not a number.
        dead_experts, overloaded_experts: [MoE layer of the model (0 = the model's first layer), expert].
    """

    name: str
    description: str
    status: Outcome | None
    steps_done: int
    steps_planned: int | None
    tokens: int | None
    train_loss: float | None
    mtp_loss: float | None
    validation_loss: float | None
    validation_step: int | None
    validation_mtp_loss: float | None
    mtp_acceptance_length: float | None
    best_validation_loss: float | None
    best_validation_step: int | None
    unigram_entropy: float | None
    tokens_per_second: float | None
    mfu: float | None
    memory: dict[str, int]
    active_seconds: float | None
    elapsed_seconds: float | None
    started: float | None
    attempts: int
    restarts: int
    kills: int
    lost_steps: int
    nonfinite_steps: int
    world_size: int | None
    layout: str
    parameters: ParameterCounts | None
    dead_experts: list[tuple[int, int]]
    overloaded_experts: list[tuple[int, int]]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def last_value(metrics: Metrics, name: str) -> tuple[float, int] | None:
    """The newest number of a column and its step."""
    places = np.flatnonzero(np.isfinite(metrics[name]))
    return (float(metrics[name][places[-1]]), int(metrics.step[places[-1]])) if len(places) else None


def best_value(metrics: Metrics, name: str) -> tuple[float, int] | None:
    """The lowest number of a column and its step."""
    values = metrics[name]
    if not np.isfinite(values).any():
        return None
    place = int(np.nanargmin(np.where(np.isfinite(values), values, np.nan)))
    return float(values[place]), int(metrics.step[place])


def _recent(metrics: Metrics, name: str) -> float | None:
    values = metrics[name][-RECENT_ROWS:]
    return float(np.nanmedian(values)) if np.isfinite(values).any() else None


def first_moe_layer(recipe: dict[str, Any]) -> int:
    """The model's layer (0 = first) that row 0 of the expert load belongs to."""
    model = recipe.get("model")
    value = model.get("first_k_dense_replace", 1) if isinstance(model, dict) else 1
    return value if isinstance(value, int) else 1


def _planned_steps(recipe: dict[str, Any]) -> int | None:
    train = recipe.get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if isinstance(steps, int) else None


def summarize(run: RunLog) -> RunSummary:
    """The headline of a run that was read."""
    metrics, attempts = run.metrics, run.attempts
    validation, best = last_value(metrics, "validation_loss"), best_value(metrics, "validation_loss")
    train, mtp = last_value(metrics, "loss"), last_value(metrics, "mtp_loss")
    validated_mtp, drafts = last_value(metrics, "validation_mtp_loss"), last_value(metrics, "mtp_acceptance_length")
    tokens = last_value(metrics, "tokens")
    offset = first_moe_layer(run.recipe)
    last = attempts[-1] if attempts else None
    model = run.recipe.get("model")
    times = [t for a in attempts for t in (a.start_time, a.end_time) if math.isfinite(t)]
    lengths = [a.end_time - a.start_time for a in attempts]
    return RunSummary(
        name=run.name,
        description=str(run.recipe.get("description", "")),
        status=last.outcome if last else None,
        steps_done=last.end_step if last else 0,
        steps_planned=_planned_steps(run.recipe),
        tokens=int(tokens[0]) if tokens else None,
        train_loss=train[0] if train else None,
        mtp_loss=mtp[0] if mtp else None,
        validation_loss=validation[0] if validation else None,
        validation_step=validation[1] if validation else None,
        validation_mtp_loss=validated_mtp[0] if validated_mtp else None,
        mtp_acceptance_length=drafts[0] if drafts else None,
        best_validation_loss=best[0] if best else None,
        best_validation_step=best[1] if best else None,
        unigram_entropy=unigram_entropy(run.recipe, run.folder),
        tokens_per_second=_recent(metrics, "tokens_per_second"),
        mfu=_recent(metrics, "mfu"),
        memory={kind: int(found[0]) for kind in MEMORY if (found := last_value(metrics, f"{kind}_bytes"))},
        active_seconds=_finite(sum(lengths)) if lengths else None,
        elapsed_seconds=max(times) - min(times) if times else None,
        started=min(times) if times else None,
        attempts=len(attempts),
        restarts=max(0, len(attempts) - 1),
        kills=sum(a.outcome == "killed" for a in attempts),
        lost_steps=sum(a.lost_steps for a in attempts),
        nonfinite_steps=len(metrics.nonfinite.get("loss", ())),
        world_size=last.world_size if last else None,
        layout=last.layout if last else "",
        parameters=count_parameters(model) if isinstance(model, dict) else None,
        dead_experts=[(i + offset, e) for i, e in metrics.load.dead] if metrics.load else [],
        overloaded_experts=[(i + offset, e) for i, e in metrics.load.overloaded] if metrics.load else [],
    )
