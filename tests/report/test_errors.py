"""The merged error summary puts the cause on top, whatever the order of logs and the clocks of nodes say."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_joy.report import job
from megatron_joy.report.attempts import Event, build_attempts
from megatron_joy.report.errors import RankError, read_errors

T0 = 1_790_000_000.0  # 2026-09-21
TRACEBACK = """\
{at} rank {rank} failed
Traceback (most recent call last):
  File "a.py", line 1, in f
    g()
RuntimeError: inner

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 2, in g
    raise ValueError("x")
{reason}
"""


def stamp(seconds: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(T0 + seconds).isoformat(sep=" ", timespec="milliseconds")


def failed(rank: int, seconds: float, reason: str) -> str:
    return TRACEBACK.format(at=stamp(seconds), rank=rank, reason=reason)


def errors(folder: Path, logs: dict[int, str], *told: str, kind: str = "error") -> list[RankError]:
    """Of a run that started at T0 and whose rank 0 wrote an event 100 s later."""
    (folder / "logs").mkdir()
    for rank, text in logs.items():
        (folder / "logs" / f"rank_{rank}.log").write_text(text)
    events = [Event(T0, 0, 0, "start", "started"), *(Event(T0 + 100, 5, 0, kind, text) for text in told)]
    return read_errors(folder, events, build_attempts(events, {}, T0 + 1000))


CLOSED = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:39517"


def test_the_earliest_failure_is_on_top_and_consequences_come_after(tmp_path: Path) -> None:
    found = errors(
        tmp_path,
        {
            0: failed(0, 99.0, CLOSED),  # its clock is behind: it seems to have been first
            1: "2026-01-01 00:00:00,123 rank 1 attempt 0 WARNING something\n" + failed(1, 100.5, "KeyError: 'expert'"),
            2: failed(2, 100.25, "torch.OutOfMemoryError: CUDA out of memory"),
            3: failed(3, 100.6, CLOSED) + "2026-09-21 00:00:00,123 rank 3 attempt 0 WARNING closing\n",
        },
        f"RuntimeError: {CLOSED}",
    )
    assert [(error.rank, error.consequence) for error in found] == [(2, False), (1, False), (0, True), (3, True)]
    assert found[0].reason == "torch.OutOfMemoryError: CUDA out of memory"
    assert found[1].reason == "KeyError: 'expert'"
    assert found[1].details.count("Traceback") == 2
    assert "WARNING" not in found[3].details


def test_a_crash_of_the_interpreter_is_a_cause(tmp_path: Path) -> None:
    crash = "Fatal Python error: Segmentation fault\n\nCurrent thread 0x01 (most recent call first):\n  File a.py\n"
    found = errors(tmp_path, {0: failed(0, 100.0, CLOSED), 1: crash}, CLOSED)
    assert [error.rank for error in found] == [1, 0]
    assert found[0].reason == "crashed: Segmentation fault"


def test_what_the_guard_said_is_there_without_a_log(tmp_path: Path) -> None:
    (found,) = errors(tmp_path, {}, "WorkError: step 6: the loss is nan")
    assert (found.rank, found.reason, found.log) == (0, "WorkError: step 6: the loss is nan", "events.jsonl")


def test_failures_of_earlier_attempts_and_of_runs_that_ended_well_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    old = failed(1, -1000.0, "KeyError: 'old'")
    found = errors(tmp_path / "a", {1: old}, "WorkError: new")
    assert [error.reason for error in found] == ["WorkError: new"]
    assert errors(tmp_path / "b", {1: failed(1, 50.0, "KeyError: 'x'")}, "all steps done", kind="finish") == []


def test_the_job_is_asked_of_squeue_and_not_at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def squeue(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "PENDING|Resources|1:00:00\n", "")

    monkeypatch.setattr(job.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(job.subprocess, "run", squeue)
    for second in (0.0, 2.0, 4.0):
        assert job.job_of({"slurm_job": "4711"}, second) == job.Job("4711", "PENDING", "Resources", "1:00:00")
    assert len(asked) == 1
    assert "--jobs=4711" in asked[0]
    assert job.job_of({"slurm_job": None}, 0.0) is None
    assert job.job_of(json.loads('{"slurm_job": "1; rm"}'), 0.0) is None
