"""Reading a run's folder: its recipe, environment, metrics, events and checkpoints, as typed values.

Everything but metrics and events may be missing or damaged: a report of a broken run is worth most. What was passed
over is said in `RunLog.notices`.
"""

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_joy.errors import UserError
from megatron_joy.report.attempts import Attempt, Event, build_attempts
from megatron_joy.report.jsonl import parse_line
from megatron_joy.report.metrics import Metrics, Progress, read_metrics

COMMIT_MARKER = "COMMITTED.json"
_STEP_PREFIX = "step_"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder; `committed` when its marker is there, `written` is the marker's (else the folder's) time."""

    step: int
    path: Path
    size_bytes: int
    committed: bool
    written: float


@dataclass(frozen=True, slots=True)
class RunLog:
    """A run as its folder tells it."""

    folder: Path
    name: str
    recipe: dict[str, Any]
    recipe_text: str
    environment: dict[str, Any]
    metrics: Metrics
    events: list[Event]
    attempts: list[Attempt]
    checkpoints: list[Checkpoint]
    notices: list[str] = field(default_factory=list)


def require_run(folder: str | Path) -> Path:
    """The folder of a run.

    Raises:
        UserError: it is not there, or holds neither metrics.jsonl nor events.jsonl.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected the folder of a run (runs/<recipe name> unless you set it)")
    if not any((path / name).is_file() for name in ("metrics.jsonl", "events.jsonl")):
        inside = [entry for entry in sorted(path.iterdir()) if (entry / "metrics.jsonl").is_file()]
        hint = f"; did you mean {inside[0]}?" if inside else "; pass the folder that `joy pretrain` writes to"
        raise UserError(f"{path}: not the folder of a run: metrics.jsonl and events.jsonl are missing{hint}")
    return path


def read_run(folder: str | Path, *, now: float, progress: Progress | None = None) -> RunLog:
    """Reads a run's folder whole.

    Args:
        folder: the run's folder.
        now: the present, unix seconds: decides whether a last attempt without an end is running or was killed.
        progress: called with (bytes read, bytes to read) of metrics.jsonl.

    Raises:
        UserError: the folder is no run's.
    """
    path = require_run(folder)
    notices: list[str] = []
    recipe_text, recipe = read_recipe(path, notices)
    events = read_events(path / "events.jsonl", notices)
    cuts = {e.attempt: e.step for e in reversed(events) if e.kind in ("start", "resume")}
    metrics = read_metrics(path / "metrics.jsonl", cuts, progress)
    if metrics.torn_tail:
        notices.append(f"metrics.jsonl ends in a torn line ({metrics.torn_tail} bytes), left out: its writer died")
    if metrics.damaged:
        notices.append(f"metrics.jsonl has {metrics.damaged} unreadable lines, left out")
    if metrics.load is not None and metrics.load.skipped:
        notices.append(f"{metrics.load.skipped} rows have an expert load of another shape, left out")
    name = recipe.get("name")
    return RunLog(
        folder=path,
        name=name if isinstance(name, str) else path.resolve().name,
        recipe=recipe,
        recipe_text=recipe_text,
        environment=read_environment(path / "environment.json", notices),
        metrics=metrics,
        events=events,
        attempts=build_attempts(events, metrics.attempts, now),
        checkpoints=read_checkpoints(path),
        notices=notices,
    )


def read_recipe(folder: Path, notices: list[str]) -> tuple[str, dict[str, Any]]:
    """Text and tables of recipe.toml; not checked against the schema, which may have moved on since the run."""
    path = folder / "recipe.toml"
    if not path.is_file():
        notices.append("recipe.toml is missing: planned steps and model size are unknown")
        return "", {}
    text = path.read_text("utf-8", errors="replace")
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        notices.append(f"recipe.toml is not TOML ({error})")
        return text, {}


def read_environment(path: Path, notices: list[str]) -> dict[str, Any]:
    """environment.json; empty, and said in `notices`, where it is missing or damaged."""
    try:
        environment = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        notices.append("environment.json is missing")
        return {}
    except orjson.JSONDecodeError as error:
        notices.append(f"environment.json is not JSON ({error})")
        return {}
    return environment if isinstance(environment, dict) else {"environment": environment}


def read_events(path: Path, notices: list[str]) -> list[Event]:
    """The events in the order they were written; unreadable lines are left out and counted in `notices`."""
    if not path.is_file():
        notices.append("events.jsonl is missing: starts, checkpoints and ends are guessed from the metrics")
        return []
    lines = path.read_bytes().split(b"\n")
    rows = [parse_line(line) for line in lines if line.strip()]
    events = [event for row in rows if row is not None and (event := Event.from_row(row)) is not None]
    if len(events) < len(rows):
        notices.append(f"events.jsonl has {len(rows) - len(events)} unreadable lines, left out")
    return events


def read_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoint folders that are on disk now, by step; uncommitted ones too."""
    root = folder / "checkpoints"
    found = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        number = path.name.removeprefix(_STEP_PREFIX)
        if path.is_dir() and path.name.startswith(_STEP_PREFIX) and number.isdecimal():
            marker = path / COMMIT_MARKER
            committed = marker.is_file()
            written = (marker if committed else path).stat().st_mtime
            found.append(Checkpoint(int(number), path, _size(path), committed, written))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _size(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pruned while we look
                continue
    return total
