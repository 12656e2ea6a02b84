"""The state of a run's job in Slurm's queue."""

import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

PATIENCE = 5.0  # seconds that a live view waits for squeue
EVERY = 30.0  # seconds between two questions of the same process: schedulers are slowed down by views that ask often


@dataclass(frozen=True)
class Job:
    """state: as Slurm says it (PENDING, RUNNING, ...); reason: why it waits; left: until its time limit."""

    number: str
    state: str
    reason: str
    left: str


def job_of(environment: dict[str, Any], now: float) -> Job | None:
    """The job that environment.json names, as squeue sees it; None without a job, without Slurm, or when it is gone."""
    number = environment.get("slurm_job")
    return _asked(number, int(now / EVERY)) if isinstance(number, str) and number.isdecimal() else None


@lru_cache(maxsize=1)
def _asked(number: str, period: int) -> Job | None:
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", f"--jobs={number}", "--format=%T|%r|%L"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    fields = done.stdout.strip().split("\n")[0].split("|")
    return Job(number, *fields) if done.returncode == 0 and len(fields) == 3 else None
