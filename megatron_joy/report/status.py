"""`joy status RUN`: where a run stands, from the ends of its files: as quick for a year as for a minute."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, JustifyMethod, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from megatron_joy.recipe.timetable import Timetable
from megatron_joy.report import text
from megatron_joy.report.attempts import Attempt, Event, Outcome, build_attempts
from megatron_joy.report.errors import RankError, read_errors
from megatron_joy.report.job import Job, job_of
from megatron_joy.report.jsonl import tail_rows
from megatron_joy.report.metrics import AttemptRows
from megatron_joy.report.payload import STEP_PHASES
from megatron_joy.report.runlog import (
    Checkpoint,
    read_checkpoints,
    read_environment,
    read_events,
    read_recipe,
    require_run,
)
from megatron_joy.report.schedule import stage_at, timetable_of

ROWS = 100
_EVENTS = 6
_ATTEMPTS = 5
_OTHER_RANKS = 3
_ATTEMPT_COLUMNS: dict[str, JustifyMethod] = {
    "attempt": "right",
    "from step": "right",
    "to step": "right",
    "ended": "left",
    "lasted": "left",
    "processes": "right",
    "layout": "left",
}
_STYLES: dict[Outcome, str] = {
    "finished": "green",
    "running": "cyan",
    "stopped": "yellow",
    "failed": "red",
    "killed": "red",
}


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Where a run stands; `joy status --json` prints it. None where the run has no such number yet.

    Attributes:
        state: how the newest attempt is or ended; None before the first.
        mtp_acceptance_length: tokens that a pass gives with MTP's drafts, in the newest validation that counted them.
        stage, stage_last_step: the stage of the next update and its last update; None for a recipe without stages.
        stage_seconds_left: until then, as `seconds_left`.
        seconds_left: until the planned last step, at the newest rows' pace by tokens; None unless it is running.
        tokens_per_second, step_seconds, mfu: medians of the newest attempt's last ROWS rows.
        peak_bytes: memory on the rank that had most.
        phases: share of the recent steps' time by phase, on the first rank.
        silent_seconds: since the run's last sign of life.
        checkpoint_step: the newest whole checkpoint on disk.
        attempts: the attempts; where one got to before a later one began is known from its events only, unless it is
            the newest.
        slowest_rank: what the newest attempt's last event of the kind "straggler" says; None without one.
        job: the Slurm job that the newest attempt runs in, while it is in the queue.
        errors: why the newest attempt failed, the rank that failed first on top.
    """

    folder: str
    name: str
    state: Outcome | None
    step: int
    steps_planned: int | None
    stage: str | None
    stage_last_step: int | None
    stage_seconds_left: float | None
    tokens: int | None
    loss: float | None
    mtp_loss: float | None
    validation_loss: float | None
    mtp_acceptance_length: float | None
    grad_norm: float | None
    lr: float | None
    tokens_per_second: float | None
    step_seconds: float | None
    mfu: float | None
    peak_bytes: float | None
    phases: dict[str, float]
    seconds_left: float | None
    silent_seconds: float | None
    checkpoint_step: int | None
    checkpoint_bytes: int | None
    attempts: list[Attempt]
    events: list[Event]
    notices: list[str]
    slowest_rank: str | None = None
    job: Job | None = None
    errors: list[RankError] = field(default_factory=list)

    @property
    def restarts(self) -> int:
        """Attempts after the first."""
        return max(0, len(self.attempts) - 1)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def read_status(folder: str | Path, *, now: float) -> RunStatus:
    """Reads where a run stands.

    Args:
        folder: the run's folder.
        now: the present, unix seconds.

    Raises:
        UserError: the folder is no run's.
    """
    path = require_run(folder)
    notices: list[str] = []
    _, recipe = read_recipe(path, notices)
    events = read_events(path / "events.jsonl", notices)
    rows = tail_rows(path / "metrics.jsonl", ROWS)
    newest = max([row.get("attempt", 0) for row in rows] + [event.attempt for event in events], default=0)
    rows = [row for row in rows if row.get("attempt", 0) == newest]
    attempts = build_attempts(events, {newest: _rows_of(rows)} if rows else {}, now)
    state = attempts[-1].outcome if attempts else None
    step = attempts[-1].end_step if attempts else 0
    planned = recipe.get("train", {}).get("steps") if isinstance(recipe.get("train"), dict) else None
    timetable = timetable_of(path)
    stage = stage_at(timetable, step)
    pace = _median(rows, "step_seconds")
    whole: list[Checkpoint] = [one for one in read_checkpoints(path) if one.committed]
    name = recipe.get("name")
    running = state == "running"
    slow = [event for event in events if event.kind == "straggler" and event.attempt == newest]
    return RunStatus(
        folder=str(path),
        name=name if isinstance(name, str) else path.resolve().name,
        state=state,
        step=step,
        steps_planned=planned,
        stage=stage.name if stage else None,
        stage_last_step=stage.last_step if stage else None,
        stage_seconds_left=_left(timetable, rows, step, stage.last_step) if stage and running else None,
        tokens=_last(rows, "tokens"),
        loss=_last(rows, "loss"),
        mtp_loss=_last(rows, "mtp_loss"),
        validation_loss=_last(rows, "validation_loss"),
        mtp_acceptance_length=_newest(rows, "mtp_acceptance_length"),
        grad_norm=_last(rows, "grad_norm"),
        lr=_last(rows, "lr"),
        tokens_per_second=_median(rows, "tokens_per_second"),
        step_seconds=pace,
        mfu=_median(rows, "mfu"),
        peak_bytes=_newest(rows, "peak_bytes"),
        phases=_phases(rows),
        seconds_left=_left(timetable, rows, step, planned) if planned and running else None,
        silent_seconds=max(0.0, now - attempts[-1].end_time) if attempts else None,
        checkpoint_step=whole[-1].step if whole else None,
        checkpoint_bytes=whole[-1].size_bytes if whole else None,
        attempts=attempts,
        events=[event for event in events if event.kind != "validation"][-_EVENTS:],
        notices=notices,
        slowest_rank=slow[-1].message if slow else None,
        job=job_of(read_environment(path / "environment.json", []), now),
        errors=read_errors(path, events, attempts),
    )


def _left(timetable: Timetable | None, rows: list[dict[str, Any]], step: int, last: int) -> float | None:
    """Seconds from `step` to `last` updates: a token takes as long as in the newest rows, whatever the updates' sizes.

    Where the timetable or the rows don't say how many tokens an update has, an update takes as long as theirs.
    """
    pace = _median(rows, "step_seconds")
    sizes = [
        {"tokens": row["global_batch_size"] * row["sequence_length"]} for row in rows if row.get("sequence_length")
    ]
    size = _median(sizes, "tokens")
    if pace is None or timetable is None or not size or not step < last <= timetable.steps:
        return None if pace is None else (last - step) * pace
    end = timetable.at(last)
    return (end.first_token + end.tokens - timetable.at(step + 1).first_token) / size * pace


def _rows_of(rows: list[dict[str, Any]]) -> AttemptRows:
    steps = [int(row["step"]) for row in rows]
    times = [float(row.get("time") or math.nan) for row in rows]
    return AttemptRows(steps[0], steps[-1], times[0], times[-1], len(rows))


def _last(rows: list[dict[str, Any]], name: str) -> Any:
    """The newest row's value; of validations, which few rows have, the newest there is."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values or (name != "validation_loss" and rows[-1].get(name) is None):
        return None
    return values[-1]


def _newest(rows: list[dict[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


def _phases(rows: list[dict[str, Any]]) -> dict[str, float]:
    total = sum(row["step_seconds"] for row in rows if row.get("step_seconds"))
    spent = {phase: sum(row.get(f"{phase}_seconds") or 0.0 for row in rows) for phase in STEP_PHASES}
    return {phase: seconds / total for phase, seconds in spent.items()} if total and any(spent.values()) else {}


def _median(rows: list[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return float(np.median(values)) if values else None


def render_status(status: RunStatus) -> RenderableType:
    """The status as rich draws it on a terminal."""
    state = f"[{_STYLES[status.state]}]{status.state}[/]" if status.state else "not started"
    parts: list[RenderableType] = [f"[bold]{escape(status.name)}[/]  {state}  [dim]{escape(status.folder)}[/]"]
    if status.steps_planned:
        bar = Table.grid(padding=(0, 2))
        share = f"{status.step / status.steps_planned:.0%}"
        bar.add_row(ProgressBar(total=status.steps_planned, completed=status.step, width=60), share)
        parts.append(bar)
    parts += ["", _numbers(status)]
    if status.phases:
        shares = "  ".join(f"{phase} {share:.0%}" for phase, share in status.phases.items())
        parts.append(f"[dim]a step's time[/]  {shares}")
    if status.errors:
        parts += ["", render_errors(status.errors)]
    parts += ["", _attempts(status.attempts), "", _events(status.events)]
    parts += [f"[yellow]note:[/] {escape(notice)}" for notice in status.notices]
    return Group(*parts)


def _numbers(s: RunStatus) -> Table:
    table = Table.grid(padding=(0, 2))
    of = f" of {s.steps_planned:,}" if s.steps_planned else ""
    pace = f"{text.count(s.tokens_per_second)} tokens/s"
    saved = f"step {s.checkpoint_step:,} ({text.size(s.checkpoint_bytes)})" if s.checkpoint_step is not None else "none"
    rows = [
        ("step", f"{s.step:,}{of}", "tokens", text.count(s.tokens)),
        ("train loss", text.loss(s.loss), "validation loss", text.loss(s.validation_loss)),
        ("MTP loss", text.loss(s.mtp_loss), "gradient norm", text.general(s.grad_norm)),
        ("learning rate", text.general(s.lr), "throughput", pace),
        ("time left", text.duration(s.seconds_left), "last sign of life", f"{text.duration(s.silent_seconds)} ago"),
        ("checkpoint", saved, "a step takes", text.duration(s.step_seconds)),
        ("restarts", f"{s.restarts}", "slowest rank", escape(s.slowest_rank or "not known")),
        ("memory of a rank", text.size(s.peak_bytes), "MFU", _percent(s.mfu)),
    ]
    if s.mtp_acceptance_length is not None:
        rows.append(("tokens a pass", f"{s.mtp_acceptance_length:.2f} with MTP's drafts", "", ""))
    if s.stage is not None and s.stage_last_step is not None:
        left = f", in {text.duration(s.stage_seconds_left)}" if s.stage_seconds_left is not None else ""
        table.add_row("[dim]stage[/]", escape(s.stage), "[dim]its last step[/]", f"{s.stage_last_step:,}{left}")
    if s.job is not None:
        waits = f" ({escape(s.job.reason)})" if s.job.state == "PENDING" else ""
        table.add_row("[dim]job[/]", f"{s.job.number} {s.job.state}{waits}", "[dim]its time left[/]", s.job.left)
    for left, a, right, b in rows:
        table.add_row(f"[dim]{left}[/]", a, f"[dim]{right}[/]", b)
    return table


def render_errors(errors: Sequence[RankError], details: bool = False) -> RenderableType:
    """Why the run failed: the first failing rank, with `details` its traceback, then the others in a line each."""
    first, *others = errors
    parts: list[RenderableType] = [
        f"[red]failed first:[/] rank {first.rank}: {escape(first.reason)}  [dim]{escape(first.log)}[/]"
    ]
    if details and first.details:
        parts.append(escape(first.details))
    shown = others if details else others[:_OTHER_RANKS]
    for error in shown:
        then = "because of it" if error.consequence else "then"
        parts.append(f"[dim]{then}:[/] rank {error.rank}: {escape(error.reason)}")
    if len(shown) < len(others):
        parts.append(f"[dim]and {len(others) - len(shown)} ranks more; `joy status RUN --errors` shows all[/]")
    return Group(*parts)


def _percent(share: float | None) -> str:
    return text.MISSING if share is None else f"{share:.1%}"


def _attempts(attempts: list[Attempt]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, side in _ATTEMPT_COLUMNS.items():
        table.add_column(name, justify=side)
    for attempt in attempts[-_ATTEMPTS:]:
        known = attempt is attempts[-1] or attempt.outcome != "killed"
        table.add_row(
            str(attempt.number),
            f"{attempt.start_step:,}",
            f"{attempt.end_step:,}" if known else f"{attempt.end_step:,}+",
            f"[{_STYLES[attempt.outcome]}]{attempt.outcome}[/]",
            text.duration(attempt.end_time - attempt.start_time) if known else text.MISSING,
            str(attempt.world_size or text.MISSING),
            escape(attempt.layout),
        )
    return table


def _events(events: list[Event]) -> Table:
    table = Table.grid(padding=(0, 2))
    for event in events:
        table.add_row(
            f"[dim]{text.moment(event.time)}[/]", f"[dim]step {event.step:,}[/]", event.kind, escape(event.message)
        )
    return table
