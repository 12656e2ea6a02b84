"""Real training under a real Slurm: whatever happens to a run on its way, its numbers are those of a quiet one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.policy import Outcome
from launch.slurm import jobs_of
from launch.supervise import read_history
from tests.slurm_cluster import ROOT, Cluster
from tests.train.minuscule import (
    EP2,
    STEPS,
    make_home,
    numbers,
    read_lines,
    train,
)

SITE = """
partition = "main"
python = "{python}"
[supervisor]
first_wait = 0.5
hang_least = 8.0
[environment]
JOY_PLANTED = '{planted}'
"""
# What ranks run is replaced by the same with mishaps.
PYTHON = """#!/bin/bash
if [[ "$1 $2 $3" == "-m megatron_joy.cli.main pretrain" ]]; then set -- -m tests.slurm.planted_rank "${{@:3}}"; fi
exec {python} "$@"
"""
Plan = dict[int, tuple[int, int, str]]


class Launcher:
    """`joy launch slurm` on the test's cluster, with mishaps."""

    def __init__(self, slurm: Cluster, home: Path, folder: Path, plan: Plan) -> None:
        self.slurm, self.home, self.run = slurm, home, folder / "run"
        python = folder / "python"
        python.write_text(PYTHON.format(python=sys.executable))
        python.chmod(0o755)
        self.site = folder / "site.toml"
        self.site.write_text(SITE.format(python=python, planted=json.dumps(plan)))

    def __call__(self, *arguments: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
        recipe = (str(self.home / "minuscule.toml"), f"run.folder={self.run}", "checkpoint.interval=1")
        options = ("--gpus-per-node", "0", "--tasks-per-node", "1", "--site", str(self.site))
        done = subprocess.run(
            [sys.executable, "-m", "megatron_joy.cli.main", "launch", "slurm", *recipe, *options, *arguments],
            env=self.slurm.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done

    @property
    def jobs(self) -> list[str]:
        return jobs_of(self.run)

    def outcomes(self, *jobs: str) -> list[Outcome]:
        return [attempt.outcome for job in jobs for attempt in read_history(self.run, f"Slurm job {job}")]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_whose_time_is_up_goes_on_by_itself_with_the_same_bits(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    home = make_home(tmp_path / "home")
    launch = Launcher(slurm, home, tmp_path, {1: (0, 3, "time is up")})
    queued = launch("--nodes", "2", *EP2)
    (job,) = launch.jobs
    assert f"{launch.run}: job {job}, output in {launch.run}/logs/slurm-{job}.out" in queued.stdout
    refused = launch("--nodes", "2", *EP2, code=2)  # it lives
    assert re.search(rf"job {job} .*; wait for it", refused.stderr)
    slurm.wait_for(job, "COMPLETED", seconds=900)
    assert launch.outcomes(job) == [Outcome.STOPPED, Outcome.FINISHED]
    assert read_history(launch.run, f"Slurm job {job}")[0].done == 3
    rows = read_lines(launch.run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))  # no step was trained twice
    assert numbers(rows) == numbers(train(home, tmp_path / "quiet", EP2, "checkpoint.interval=1").rows)
