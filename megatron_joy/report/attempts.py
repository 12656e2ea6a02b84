"""The attempts of a run: each start of it, where it came from, how far it got and how it ended."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_joy.report.metrics import AttemptRows

Outcome = Literal["finished", "stopped", "failed", "killed", "running"]
_ENDS: dict[str, Outcome] = {"finish": "finished", "stop": "stopped", "error": "failed"}
_STANDARD_KEYS = frozenset({"time", "step", "attempt", "kind", "message"})
QUIET_SECONDS = 120.0
"""A last attempt that wrote nothing for this long, or for twenty of its steps, and never said it ended, was killed."""
_QUIET_STEPS = 20


@dataclass(frozen=True, slots=True)
class Event:
    """One line of events.jsonl; `extra` has the keys beyond the standard ones."""

    time: float
    step: int
    attempt: int
    kind: str
    message: str
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Event | None":
        """The event of a parsed line, or None when the line lacks what every event has."""
        try:
            return cls(
                time=float(row["time"]),
                step=int(row["step"]),
                attempt=int(row.get("attempt", 0)),
                kind=str(row["kind"]),
                message=str(row.get("message", "")),
                extra={key: value for key, value in row.items() if key not in _STANDARD_KEYS},
            )
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of the run.

    Attributes:
        number: 0 for the first.
        start_step: completed steps it began from.
        end_step: completed steps when it ended; where a guard went back, less than it had at some time.
        kept_step: up to where its steps count; less than `end_step` when the next attempt resumed from before it.
        start_time, end_time: unix seconds.
        outcome: how it ended; "killed" means without a word.
        message: of its last word, if any.
        world_size, layout: as its first event says.
    """

    number: int
    start_step: int
    end_step: int
    kept_step: int
    start_time: float
    end_time: float
    outcome: Outcome
    message: str
    world_size: int | None
    layout: str

    @property
    def lost_steps(self) -> int:
        """Steps that had to be run again."""
        return self.end_step - self.kept_step


def build_attempts(events: list[Event], rows: Mapping[int, AttemptRows], now: float) -> list[Attempt]:
    """Attempts by number, from the events and from what metrics.jsonl has of each (see `AttemptRows`)."""
    by_number: dict[int, list[Event]] = {}
    for event in events:
        by_number.setdefault(event.attempt, []).append(event)
    numbers = sorted(set(by_number) | set(rows))
    attempts: list[Attempt] = []
    ceiling: int | None = None
    for number in reversed(numbers):
        attempt = _attempt(number, by_number.get(number, []), rows.get(number), ceiling, now)
        attempts.append(attempt)
        ceiling = attempt.start_step if ceiling is None else min(ceiling, attempt.start_step)
    return attempts[::-1]


def _attempt(number: int, events: list[Event], rows: AttemptRows | None, ceiling: int | None, now: float) -> Attempt:
    steps = [event.step for event in events] + ([] if rows is None else [rows.first_step - 1])
    times = [event.time for event in events]
    if rows is not None:
        times += [time for time in (rows.first_time, rows.last_time) if math.isfinite(time)]
    first = next((event for event in events if event.kind in ("start", "resume")), None)
    last_word = next((event for event in reversed(events) if event.kind in _ENDS), None)
    start_step = first.step if first else min(steps)
    end_step = _stands_at(events, rows)
    start_time, end_time = (min(times), max(times)) if times else (math.nan, math.nan)
    extra = first.extra if first else {}
    world_size = extra.get("world_size")
    return Attempt(
        number=number,
        start_step=start_step,
        end_step=end_step,
        kept_step=end_step if ceiling is None else max(start_step, min(end_step, ceiling)),
        start_time=start_time,
        end_time=end_time,
        outcome=_ENDS[last_word.kind] if last_word else _silent_outcome(ceiling is None, end_time, rows, now),
        message=last_word.message if last_word else "",
        world_size=world_size if isinstance(world_size, int) else None,
        layout=layout_text(extra.get("layout")),
    )


def _stands_at(events: list[Event], rows: AttemptRows | None) -> int:
    """Completed steps at an attempt's end. Where a guard went back, what was done before that doesn't count."""
    last = max((i for i, event in enumerate(events) if event.kind == "rollback"), default=None)
    if last is None:
        return max([event.step for event in events] + ([] if rows is None else [rows.first_step - 1, rows.last_step]))
    went = events[last]
    steps = [int(went.extra.get("back_to", went.step)), *(event.step for event in events[last + 1 :])]
    return max([*steps, rows.last_step] if rows is not None and rows.last_time > went.time else steps)


def _silent_outcome(latest: bool, end_time: float, rows: AttemptRows | None, now: float) -> Outcome:
    """Running or killed, for an attempt that never said how it ended."""
    step_seconds = (rows.last_time - rows.first_time) / max(1, rows.rows - 1) if rows else 0.0
    patience = max(QUIET_SECONDS, _QUIET_STEPS * step_seconds)
    return "running" if latest and now - end_time < patience else "killed"


_LAYOUT_NAMES = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "virtual_pipeline_model_parallel_size": "VPP",
    "context_parallel_size": "CP",
    "expert_model_parallel_size": "EP",
    "expert_tensor_parallel_size": "ETP",
    "data_parallel_size": "DP",
}


def layout_text(layout: Any) -> str:
    """A layout in a few characters ("TP2 PP2 DP1"): degrees above 1, whether it comes as text or as recipe keys."""
    if not isinstance(layout, dict):
        return str(layout) if layout else ""
    named = {_LAYOUT_NAMES.get(str(key), str(key).upper()): value for key, value in layout.items()}
    degrees = [f"{k}{v}" for k, v in named.items() if isinstance(v, int) and not isinstance(v, bool) and v > 1]
    return " ".join(degrees) or "one process"
