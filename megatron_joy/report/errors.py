"""Why a run failed, from all ranks' logs and the run's events: the rank that failed first on top.

When a rank fails, the others fail a moment later because it is gone. So an error that only says that somebody else has
left ranks behind one that doesn't, whatever the clocks of the nodes say; among equals the earlier one is first.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megatron_joy.report.attempts import Attempt, Event

TAIL_BYTES = 1 << 20  # of a log; an error is at its end
SLACK_SECONDS = 120.0  # clocks of nodes, and of a log written before the attempt's first event
# What ranks say when another one is gone: gloo, NCCL, torch's store, pipes.
CONSEQUENCE = re.compile(
    r"Connection (closed|reset)|Broken pipe|remote process (exited|has)|Socket (Timeout|closed)|Timed out waiting"
    r"|NCCL (error|communicator)|Watchdog caught collective|DistNetworkError|DistBackendError|connectFullMesh",
    re.IGNORECASE,
)
_FAILED = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:[.,]\d+)?) rank (\d+) failed$")
_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_CRASH = re.compile(r"^Fatal Python error: (.*)$")


@dataclass(frozen=True)
class RankError:
    """Why a rank failed. `reason` is one line, `details` its traceback; `time` in unix seconds, None if not known."""

    rank: int
    time: float | None
    reason: str
    details: str
    log: str

    @property
    def consequence(self) -> bool:
        """Whether it only says that another rank has gone."""
        return CONSEQUENCE.search(self.reason) is not None


def read_errors(folder: Path, events: Sequence[Event], attempts: Sequence[Attempt]) -> list[RankError]:
    """The errors of the newest attempt, the first failing rank's on top; [] where it didn't fail."""
    if not attempts or attempts[-1].outcome in ("finished", "stopped", "running"):
        return []
    since = attempts[-1].start_time - SLACK_SECONDS
    found = [error for path in sorted((folder / "logs").glob("rank_*.log")) for error in _of_log(path)]
    newest = {error.rank: error for error in found if error.time is None or error.time >= since}
    for event in events:
        if event.kind == "error" and event.attempt == attempts[-1].number:
            # Rank 0 writes events. Its log has the traceback, if there is one.
            kept = newest.get(0)
            if kept is None or kept.reason.partition(":")[0] not in event.message:
                newest[0] = RankError(0, event.time, event.message, "", "events.jsonl")
    return sorted(newest.values(), key=_order)


def _order(error: RankError) -> tuple[bool, float, int]:
    # A crash of the interpreter has no time, and is never a consequence.
    return error.consequence, error.time or 0.0, error.rank


def _of_log(path: Path) -> list[RankError]:
    """The last failure in a rank's log, if any."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    rank = int(number[1]) if (number := re.search(r"rank_(\d+)\.log$", path.name)) else -1
    for index in range(len(lines) - 1, -1, -1):
        if crash := _CRASH.match(lines[index]):
            return [RankError(rank, None, f"crashed: {crash[1]}", "\n".join(lines[index:]), _shown(path))]
        if failed := _FAILED.match(lines[index]):
            block = lines[index + 1 :]
            end = next((n for n, line in enumerate(block) if _STAMP.match(line)), len(block))
            at = datetime.fromisoformat(failed[1].replace(",", ".")).timestamp()
            return [RankError(int(failed[2]), at, _last_line(block[:end]), "\n".join(block[:end]), _shown(path))]
    return []


def _shown(path: Path) -> str:
    return f"logs/{path.name}"


def _last_line(block: Sequence[str]) -> str:
    """The exception's own line: the last one that isn't indented after the last "Traceback", or the last at all."""
    starts = [number for number, line in enumerate(block) if line.startswith("Traceback (most recent call last)")]
    after = block[starts[-1] + 1 :] if starts else block
    line = next((line for line in after if line and not line.startswith(" ")), None)
    return line if line is not None else next((line.strip() for line in reversed(block) if line.strip()), "")
