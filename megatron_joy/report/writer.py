"""What a run writes about itself while it runs: metrics.jsonl, events.jsonl and their TensorBoard mirror.

One process of a run owns the writer. A row is on its way to the disk when the call returns, so SIGKILL loses at most
the row being written; the next attempt's writer cuts a torn line off and says so in an event.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from megatron_joy.report.jsonl import JsonLines

if TYPE_CHECKING:
    from megatron_joy.report.tensorboard import TensorBoardMirror

_LOAD_DECIMALS = 6


def _as_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row that strict JSON can hold: NaN and infinities become null and are named under `nonfinite`."""
    row = dict(values)
    bad = {k: str(float(v)) for k, v in row.items() if isinstance(v, (float, np.floating)) and not math.isfinite(v)}
    if bad:
        row |= dict.fromkeys(bad) | {"nonfinite": bad}
    if row.get("expert_load") is not None:
        # A share of 1/256 keeps four digits; full precision would triple the file for nothing one can see.
        row["expert_load"] = np.round(np.asarray(row["expert_load"], np.float64), _LOAD_DECIMALS)
    return row


class MetricsWriter:
    """Appends to the log of a run.

    Args:
        run_folder: the run's folder; made when missing.
        attempt: number of this start of the run, 0 for the first; every row carries it.
        tensorboard: mirror the scalars and the expert load into `events/`.

    Raises:
        WorkError: a row cannot be written (a full disk); the files still end in whole lines.
    """

    def __init__(self, run_folder: str | Path, attempt: int, *, tensorboard: bool = True) -> None:
        self.folder = Path(run_folder)
        self.attempt = attempt
        self._metrics = JsonLines(self.folder / "metrics.jsonl")
        self._events = JsonLines(self.folder / "events.jsonl")
        self._mirror: TensorBoardMirror | None = None
        self._mirror_wanted = tensorboard
        # An attempt's first event is its start, so what the repair has to say waits until that is written.
        self._repairs = [
            f"{file.path.name} ended in a torn line of {file.removed_bytes} bytes, which was removed"
            for file in (self._metrics, self._events)
            if file.removed_bytes
        ]

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Writes one step's row (docs/report.md lists the keys); `attempt` and `time` are filled in when missing.

        Args:
            values: at least `step` (int, completed steps after this one). Floats may be NaN. `expert_load` is
                [moe_layers, experts], each row summing to 1, as lists or a numpy array.
        """
        row = _as_row({"step": int(values["step"]), "attempt": self.attempt, "time": time.time()} | dict(values))
        self._metrics.append(row)
        self._mirrored(row)

    def event(self, kind: str, step: int, message: str, **extra: Any) -> None:
        """Writes one event. An attempt's first is "start" or "resume", with `world_size` and `layout` as extras.

        Args:
            kind: start, resume, checkpoint, validation, stop, finish, error, alarm, note; a guard's (docs/guards.md).
            step: completed steps when it happened.
            message: one line for a person.
            extra: what else to keep, as JSON holds it.
        """
        row = {"time": time.time(), "step": int(step), "attempt": self.attempt, "kind": kind, "message": message}
        self._events.append(_as_row(row | extra))
        repairs, self._repairs = self._repairs, []
        for text in repairs:
            self.event("note", step, text)
        self._events.sync()
        if self._mirror is not None:
            # A kill right after a checkpoint must not leave TensorBoard without the steps the checkpoint holds.
            self._guarded(self._mirror.flush)

    def _mirrored(self, row: dict[str, Any]) -> None:
        if self._mirror is None and self._mirror_wanted:
            from megatron_joy.report.tensorboard import TensorBoardMirror  # costs a second: only where it is wanted

            # What an earlier attempt showed from this step on was lost with it, and is shown anew.
            purge_step = row["step"] if self.attempt > 0 else None
            self._mirror = TensorBoardMirror(self.folder / "events", purge_step)
        if self._mirror is not None:
            self._guarded(self._mirror.step, row)

    def _guarded(self, call: Any, *arguments: Any) -> None:
        """The mirror is a convenience: when its disk fails, the run goes on without it and says so once."""
        try:
            call(*arguments)
        except OSError as error:
            self._mirror, self._mirror_wanted = None, False
            step = arguments[0]["step"] if arguments else 0
            self.event("note", step, f"TensorBoard's event file cannot be written ({error.strerror}): mirror off")

    def close(self) -> None:
        """Flushes and closes everything; a second call does nothing."""
        mirror, self._mirror, self._mirror_wanted = self._mirror, None, False
        if mirror is not None:
            mirror.close()
        self._metrics.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
