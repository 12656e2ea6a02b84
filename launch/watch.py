"""Whether a run moves, seen from outside: rank 0's heartbeat against limits. All ranks wait for each other in every
step, so one of them tells for all.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_joy.runstate.heartbeat import Beat, Phase, read_beat

PAUSE_SECONDS = 30.0  # between two looks: who looks was stopped too (Ctrl-Z), or waited for a file system


@dataclass(frozen=True)
class Limits:
    """Seconds without a sign after which a run hangs.

    A step may take `factor` times the median of its attempt's steps, and `least` in any case; before the first step,
    and between steps (validation, checkpoint), `slow`.
    """

    factor: float = 10.0
    least: float = 60.0
    slow: float = 1800.0

    def of(self, beat: Beat | None) -> float:
        """How long this heartbeat may stay as it is."""
        if beat is None or beat.phase != "step" or beat.median is None:
            return self.slow
        return max(self.least, self.factor * beat.median)


@dataclass
class Watch:
    """Watches one attempt. stale: heartbeats that are none of its, of earlier attempts that nobody numbered."""

    run: Path
    fence: int
    limits: Limits
    stale: Sequence[Beat] = ()
    done: int = 0
    _beat: Beat | None = None
    _changed: float = field(default_factory=time.monotonic)
    _looked: float = field(default_factory=time.monotonic)

    def look(self) -> str | None:
        """Reads the heartbeat; a line about a hang when there is one."""
        beat = read_beat(self.run, 0, self.fence)
        now = time.monotonic()
        if beat != self._beat and beat is not None and beat not in self.stale:
            self._beat, self._changed = beat, now
            self.done = max(self.done, beat.done)
        if now - self._looked > PAUSE_SECONDS:
            self._changed = now  # what happened meanwhile nobody saw
        self._looked = now
        limit = self.limits.of(self._beat)
        silent = now - self._changed
        if silent <= limit:
            return None
        where: dict[Phase | None, str] = {
            None: "before the loop",
            "start": "before the first step",
            "step": f"in step {self.done + 1}",
            "between": f"after step {self.done}",
            "end": "while leaving",
        }
        place = where[self._beat.phase if self._beat else None]
        median = self._beat.median if self._beat and self._beat.phase == "step" else None
        because = f", a step takes {median:.2f} s in the median" if median else ""
        return f"hangs {place}: no sign for {silent:.0f} s (limit {limit:.0f} s{because})"


def seconds_between_looks(limits: Limits) -> float:
    """How often to look: no more often than is of use."""
    return statistics.median((0.2, limits.least / 20, 5.0))
