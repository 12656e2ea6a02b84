"""Reading metrics.jsonl: streamed twice, never held as Python objects, so that a million steps fit in a laptop.

The first pass finds, for every line, its step and attempt, and from them which lines count. After a resume, steps are
run again: a later attempt owns every step after the one it resumed from, and what an earlier attempt had written there
is lost work, not history. The second pass parses the lines that count into columns.
"""

import re
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_joy.report.histories import LoadAccumulator, LoadHistory, SourceAccumulator, SourceHistory
from megatron_joy.report.jsonl import parse_line

Column = NDArray[np.float64]
Progress = Callable[[int, int], None]
"""Called now and then with (bytes read, bytes to read), both passes together."""

COLUMNS = (
    "time",
    "loss",
    "mtp_loss",
    "lr",
    "grad_norm",
    "tokens",
    "samples",
    "step_seconds",
    "tokens_per_second",
    "loss_tokens",
    "validation_loss",
    "validation_mtp_loss",
    "mtp_acceptance_length",
    "mtp_acceptance_ratio",
    "mtp_acceptance_1",
    "mtp_acceptance_2",
    "mtp_acceptance_3",
    "balance_loss",
    "worst_violation",
    "tokens_per_second_per_device",
    "model_flops_per_token",
    "mfu",
    "data_seconds",
    "forward_seconds",
    "backward_seconds",
    "communication_seconds",
    "optimizer_seconds",
    "validation_seconds",
    "checkpoint_seconds",
    "parameters_bytes",
    "gradients_bytes",
    "optimizer_bytes",
    "peak_bytes",
)
_STEP = re.compile(rb'"step"\s*:\s*(\d+)')
_ATTEMPT = re.compile(rb'"attempt"\s*:\s*(\d+)')
_PROGRESS_LINES = 20_000
_NAN = float("nan")


@dataclass(frozen=True, slots=True)
class AttemptRows:
    """What one attempt left in metrics.jsonl, counted or not."""

    first_step: int
    last_step: int
    first_time: float
    last_time: float
    rows: int


@dataclass(frozen=True, slots=True)
class Metrics:
    """The rows that count, one entry a step, in order of steps.

    `columns` has an array [rows] float64 for each name in COLUMNS, NaN where the row has no number. `torn_tail` is the
    length in bytes of a torn last line, 0 when the file ends well; `damaged` counts unreadable lines before it;
    `superseded` counts rows that a later attempt ran again.
    """

    step: NDArray[np.int64]
    attempt: NDArray[np.int64]
    columns: dict[str, Column]
    load: LoadHistory | None
    sources: SourceHistory | None
    nonfinite: dict[str, list[int]]
    attempts: dict[int, AttemptRows]
    torn_tail: int
    damaged: int
    superseded: int

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, name: str) -> Column:
        return self.columns[name]


@dataclass(slots=True)
class _Scan:
    """What the first pass finds: a step and an attempt for every line (-1: unreadable)."""

    step: array = field(default_factory=lambda: array("q"))  # type: ignore[type-arg]
    attempt: array = field(default_factory=lambda: array("q"))  # type: ignore[type-arg]
    edges: dict[int, list[bytes]] = field(default_factory=dict)
    size: int = 0
    torn_tail: int = 0


def read_metrics(path: Path, cuts: Mapping[int, int] | None = None, progress: Progress | None = None) -> Metrics:
    """Reads metrics.jsonl; a missing file is a run without rows.

    Args:
        path: the file.
        cuts: per attempt the completed steps it started from, where the events say so; otherwise the attempt's first
            row tells.
        progress: see `Progress`.
    """
    scan = _scan(path, progress) if path.is_file() else _Scan()
    step, attempt = np.array(scan.step, np.int64), np.array(scan.attempt, np.int64)
    counts = winners(step, attempt, cuts or {})
    reader = _Reader(step[counts])
    if counts.any():
        _parse(path, scan.size, counts, reader, progress)
    readable = int((step >= 0).sum())
    lines = len(step) - (scan.torn_tail > 0)
    return reader.finish(
        attempts={number: _attempt_rows(step[attempt == number], ends) for number, ends in scan.edges.items()},
        torn_tail=scan.torn_tail,
        damaged=lines - readable + reader.damaged,
        superseded=readable - int(counts.sum()),
    )


def winners(step: NDArray[np.int64], attempt: NDArray[np.int64], cuts: Mapping[int, int]) -> NDArray[np.bool_]:
    """Which lines count, as a mask [lines]: those that no later attempt replaces, nor a later line of the same or an
    earlier step: an attempt that a guard takes back writes steps again.

    Args:
        step: [lines] completed steps, -1 for an unreadable line.
        attempt: [lines] number of the attempt.
        cuts: per attempt the completed steps it started from (attempts that left no row included).
    """
    keep = step >= 0
    numbers = sorted(set(attempt[keep].tolist()) | set(cuts), reverse=True)
    ceiling = np.iinfo(np.int64).max
    for number in numbers:
        mine = keep & (attempt == number)
        first = int(step[mine].min()) - 1 if mine.any() else ceiling
        places = np.flatnonzero(mine)
        later = np.append(np.minimum.accumulate(step[places][::-1])[::-1][1:], np.iinfo(np.int64).max)
        keep[places[step[places] >= later]] = False
        keep &= ~mine | (step <= ceiling)
        ceiling = min(ceiling, first, cuts.get(number, ceiling))
    return keep


def _scan(path: Path, progress: Progress | None) -> _Scan:
    scan = _Scan(size=path.stat().st_size)
    done = 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            done += len(line)
            if done > scan.size:  # the run is still writing: what came after we looked is for the next report
                scan.size = done - len(line)
                break
            step, attempt = _key(line)
            if step < 0 and not line.endswith(b"\n"):
                scan.torn_tail = len(line)
            scan.step.append(step)
            scan.attempt.append(attempt)
            if step >= 0:
                ends = scan.edges.setdefault(attempt, [line, line])
                ends[1] = line
            if progress and number % _PROGRESS_LINES == 0:
                progress(done, 2 * scan.size)
    return scan


def _key(line: bytes) -> tuple[int, int]:
    """Step and attempt of a line, without parsing it where it is as we write it; (-1, -1) if it is no row."""
    if line.endswith(b"}\n"):
        step, attempt = _STEP.search(line), _ATTEMPT.search(line)
        if step and attempt:
            return int(step[1]), int(attempt[1])
    row = parse_line(line)
    if row is None or not isinstance(row.get("step"), int):
        return -1, -1
    return row["step"], int(row.get("attempt", 0))


def _attempt_rows(steps: NDArray[np.int64], ends: list[bytes]) -> AttemptRows:
    times = [float((parse_line(line) or {}).get("time") or _NAN) for line in ends]
    # The last row and not the largest step: a guard may have gone back.
    return AttemptRows(int(steps.min()), int(steps[-1]), times[0], times[1], len(steps))


def _parse(path: Path, size: int, counts: NDArray[np.bool_], reader: "_Reader", progress: Progress | None) -> None:
    done = 0
    with path.open("rb") as file:
        for number, (line, counted) in enumerate(zip(file, counts.tolist(), strict=False)):
            done += len(line)
            if counted:
                reader.add(parse_line(line))
            if progress and number % _PROGRESS_LINES == 0:
                progress(size + done, 2 * size)


class _Reader:
    """Columns under construction."""

    def __init__(self, steps: NDArray[np.int64]) -> None:
        self.damaged = 0
        self._step, self._attempt = array("q"), array("q")
        self._columns = {name: array("d") for name in COLUMNS}
        self._nonfinite: dict[str, list[int]] = {}
        span = (int(steps.min()), int(steps.max())) if len(steps) else (0, 0)
        self._load, self._sources = LoadAccumulator(*span), SourceAccumulator(*span)

    def add(self, row: dict[str, Any] | None) -> None:
        if row is None:  # whole to the eye (it ends in a brace) but not JSON
            self.damaged += 1
            return
        step = row["step"]
        self._step.append(step)
        self._attempt.append(row.get("attempt", 0))
        for name, column in self._columns.items():
            value = row.get(name)
            column.append(_NAN if value is None else value)
        for name in self._broken(row):
            self._nonfinite.setdefault(name, []).append(step)
        if row.get("expert_load"):
            self._load.add(step, row["expert_load"])
        if row.get("sources"):
            self._sources.add(step, row["sources"])

    @staticmethod
    def _broken(row: dict[str, Any]) -> list[str]:
        names = list(row.get("nonfinite") or ())
        loss = row.get("loss", 0.0)
        # A row always has a loss: null is how strict JSON writers say NaN, a bare NaN how the lenient ones do.
        if "loss" not in names and (loss is None or not -1e300 < loss < 1e300):
            names.append("loss")
        return names

    def finish(self, **rest: Any) -> Metrics:
        step = np.array(self._step, np.int64)
        order = np.argsort(step, kind="stable")
        return Metrics(
            step=step[order],
            attempt=np.array(self._attempt, np.int64)[order],
            columns={name: np.array(column, np.float64)[order] for name, column in self._columns.items()},
            load=self._load.finish(),
            sources=self._sources.finish(),
            nonfinite={name: sorted(steps) for name, steps in self._nonfinite.items()},
            **rest,
        )
