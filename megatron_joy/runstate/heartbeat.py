"""A rank's heartbeat: a line that is overwritten at every step, so that a hang is seen from outside.

The file's content matters, not its time: whoever watches notes with its own clock when the content changed, so clocks
of nodes may differ.
"""

import json
import os
import platform
import statistics
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_joy.runstate import launch_folder
from megatron_joy.runstate.files import read_json

LINE = 256  # bytes; always the same number, so a shorter line leaves nothing of a longer one
REMEMBERED = 50  # steps that the median is of

# start: before the first step; step: an update is computed; between: validation, metrics, checkpoint; end: leaving.
Phase = Literal["start", "step", "between", "end"]


@dataclass(frozen=True)
class Beat:
    """Where a rank is. done: updates that are done; median: seconds of a step, None before the first."""

    rank: int
    fence: int
    node: str
    pid: int
    done: int
    phase: Phase
    median: float | None


def node_name() -> str:
    """This node as Slurm calls it, or as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def _path(run: Path, rank: int) -> Path:
    return launch_folder(run) / "heartbeats" / f"rank_{rank}.json"


class Heart:
    """A rank's side. A heartbeat that can't be written is left out: a full disk is no reason to stop."""

    def __init__(self, run: Path, rank: int, fence: int) -> None:
        self._path, self._rank, self._fence = _path(run, rank), rank, fence
        self._node, self._pid = node_name(), os.getpid()
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._began: float | None = None

    def forget(self) -> None:
        """Steps take another time from now on."""
        self._seconds.clear()

    def beat(self, done: int, phase: Phase) -> None:
        """Writes where this rank is; a step is timed from `step` to the next beat."""
        now = time.perf_counter()
        if self._began is not None:
            self._seconds.append(now - self._began)
        self._began = now if phase == "step" else None
        median = round(statistics.median(self._seconds), 6) if self._seconds else None
        beat = Beat(self._rank, self._fence, self._node[:60], self._pid, done, phase, median)
        line = json.dumps(asdict(beat)).encode().ljust(LINE - 1) + b"\n"
        with suppress(OSError):
            self._write(line)

    def _write(self, line: bytes) -> None:
        # Opened anew each time: on network file systems others see what was written when the file is closed.
        flags = os.O_WRONLY | os.O_CREAT
        try:
            descriptor = os.open(self._path, flags, 0o644)
        except FileNotFoundError:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, flags, 0o644)
        try:
            os.pwrite(descriptor, line, 0)
        finally:
            os.close(descriptor)


def read_beat(run: Path, rank: int, fence: int) -> Beat | None:
    """A rank's newest heartbeat of an attempt; None when there is none."""
    value = read_json(_path(run, rank))
    try:
        beat = Beat(**value) if value is not None else None
    except TypeError:
        return None
    return beat if beat is not None and beat.fence == fence else None


def read_beats(run: Path, fence: int) -> list[Beat]:
    """All ranks' newest heartbeats of an attempt, by rank."""
    ranks = (path.stem.removeprefix("rank_") for path in (launch_folder(run) / "heartbeats").glob("rank_*.json"))
    numbers = sorted(int(rank) for rank in ranks if rank.isdecimal())
    return [beat for rank in numbers if (beat := read_beat(run, rank, fence)) is not None]
