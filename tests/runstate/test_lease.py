"""Never two writers: one launch holds the lease, an attempt's number is claimed once, an older one writes no more."""

import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_joy.errors import UserError, WorkError
from megatron_joy.runstate import launch_folder, lease
from megatron_joy.runstate.files import write_json
from megatron_joy.runstate.lease import Holder, Lease, check_fence, newest_claim, read_holder, refuse_if_held

FAR = Holder("Slurm job 7", "another-host", 4711, fence=3)


def write(run: Path, holder: Holder) -> None:
    write_json(launch_folder(run) / "lease.json", asdict(holder))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 60.0)  # what lives is refused long before it is over
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.0)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.02)


def test_a_living_launch_is_named_and_a_silent_one_is_nobody(tmp_path: Path) -> None:
    refuse_if_held(tmp_path, "mine")
    write(tmp_path, FAR)
    with pytest.raises(UserError, match=r"Slurm job 7 \(process 4711 on another-host\) trains this run now"):
        refuse_if_held(tmp_path, "mine")
    refuse_if_held(tmp_path, FAR.launch)  # the same job, requeued
    ago = time.time() - 61
    os.utime(launch_folder(tmp_path) / "lease.json", (ago, ago))
    refuse_if_held(tmp_path, "mine")


def test_a_launch_that_renews_while_it_is_watched_is_not_taken_over(tmp_path: Path) -> None:
    write(tmp_path, FAR)
    renewing = threading.Timer(0.2, write, (tmp_path, replace(FAR, renewals=1)))
    renewing.start()
    with pytest.raises(UserError, match="Slurm job 7"):
        Lease(tmp_path, "mine").take()
    assert newest_claim(tmp_path) == 0


def test_a_silent_launch_is_taken_over_whatever_its_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.6)
    write(tmp_path, FAR)
    ahead = time.time() + 3600
    os.utime(launch_folder(tmp_path) / "lease.json", (ahead, ahead))
    began = time.monotonic()
    assert Lease(tmp_path, "mine").take() == 1
    assert time.monotonic() - began >= 0.6


def test_a_dead_process_of_this_host_holds_nothing(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write(tmp_path, Holder("launch 1", platform.node(), gone.pid, fence=1))
    refuse_if_held(tmp_path, "mine")
    write(tmp_path, Holder("launch 1", platform.node(), os.getpid(), fence=1))
    with pytest.raises(UserError, match="launch 1"):
        refuse_if_held(tmp_path, "mine")
    write(tmp_path, Holder("launch 1", platform.node(), os.getpid(), fence=1, released=True))
    refuse_if_held(tmp_path, "mine")


def test_an_attempt_that_was_given_up_writes_no_more(tmp_path: Path) -> None:
    frozen, later = Lease(tmp_path, "Slurm job 7"), Lease(tmp_path, "Slurm job 7")
    assert frozen.take() == 1
    frozen.renew()
    check_fence(tmp_path, 1)
    assert later.take() == 2
    with pytest.raises(WorkError, match=r"attempt 1 .* was given up and attempt 2 begun"):
        frozen.renew()
    frozen.release()  # takes nothing from the later one
    holder = read_holder(tmp_path)
    assert holder is not None
    assert (holder.fence, holder.released) == (2, False)


_all_there: Any = None  # in a process of the pool: a barrier


def _wait_with(others: Any) -> None:
    global _all_there
    _all_there = others


def _claim(run: str) -> int:
    _all_there.wait()
    try:
        return Lease(Path(run), "the same launch").take()
    except UserError:
        return 0


def test_of_many_at_once_each_number_goes_to_one(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    with processes.Pool(8, _wait_with, [processes.Barrier(8)]) as pool:
        claimed = pool.map(_claim, [str(tmp_path)] * 8, chunksize=1)
    numbers = Counter(number for number in claimed if number)
    assert numbers
    assert set(numbers.values()) == {1}
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
