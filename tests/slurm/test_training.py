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
from tests.slurm_cluster import ROOT, Cluster, wait_until
from tests.train.minuscule import (
    EP2,
    ONE,
    STAGED_STEPS,
    STEPS,
    last_rows,
    make_home,
    make_staged_home,
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
JOY_PLANTED_MARK = "{mark}"
"""
# What ranks run is replaced by the same with mishaps.
PYTHON = """#!/bin/bash
if [[ "$1 $2 $3" == "-m megatron_joy.cli.main pretrain" ]]; then set -- -m tests.slurm.planted_rank "${{@:3}}"; fi
exec {python} "$@"
"""
Numbers = list[tuple[float, ...]]
Plan = dict[int, tuple[int, int, str]]


class Launcher:
    """`joy launch slurm` on the test's cluster, with mishaps."""

    def __init__(self, slurm: Cluster, home: Path, folder: Path, plan: Plan) -> None:
        self.slurm, self.home, self.run, self.mark = slurm, home, folder / "run", folder / "mark"
        python = folder / "python"
        python.write_text(PYTHON.format(python=sys.executable))
        python.chmod(0o755)
        self.site = folder / "site.toml"
        self.site.write_text(SITE.format(python=python, planted=json.dumps(plan), mark=self.mark))

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

    def printed(self, job: str) -> str:
        return (self.run / "logs" / f"slurm-{job}.out").read_text()

    @property
    def numbers(self) -> list[tuple[float, ...]]:
        return numbers(last_rows(read_lines(self.run / "metrics.jsonl")))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and recipe."""
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def quiet(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    """The numbers of two ranks that nobody disturbs."""
    return numbers(train(home, tmp_path_factory.mktemp("quiet") / "run", EP2, "checkpoint.interval=1").rows)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_job_comes_through_its_time_limit_a_hang_and_a_lost_node(
    slurm: Cluster, home: Path, quiet: Numbers, tmp_path: Path
) -> None:
    plan: Plan = {1: (0, 3, "time is up"), 2: (1, 6, "freeze"), 3: (1, 7, "wait")}
    launch = Launcher(slurm, home, tmp_path, plan)
    queued = launch("--nodes", "2", *EP2)
    (job,) = launch.jobs
    assert f"{launch.run}: job {job}, output in {launch.run}/logs/slurm-{job}.out" in queued.stdout
    refused = launch("--nodes", "2", *EP2, code=2)  # it lives
    assert re.search(rf"job {job} .*; wait for it", refused.stderr)
    wait_until(launch.mark.exists, 1200, "the third attempt")
    node = launch.mark.read_text()
    assert slurm.run("squeue", "-h", "-j", job, "-o", "%B") != node  # the batch host lives
    slurm.kill_node(node)
    slurm.wait_for(job, "COMPLETED", seconds=900)
    first, second, third, last = launch.outcomes(job)
    assert (first, second, last) == (Outcome.STOPPED, Outcome.HUNG, Outcome.FINISHED)
    assert third in (Outcome.FAILED, Outcome.HUNG)  # srun may say nothing of a node that is gone
    stopped, hung, lost, _ = read_history(launch.run, f"Slurm job {job}")
    assert stopped.done == 3
    assert re.match(
        r"hangs in step 6: no sign for .*; rank 1 on n\d is stopped \(SIGSTOP\) after step 5 at ", hung.message
    )
    assert "planted_rank.py" in (launch.run / "launch" / "hang_000002.txt").read_text()
    assert "freeze" in (launch.run / "logs" / "rank_1.log").read_text()
    assert (lost.message, lost.nodes) == (f"no answer any more from {node}", (node,))
    assert node not in slurm.run("squeue", "--states=all", "-h", "-j", job, "-o", "%N")
    assert launch.numbers == quiet
    assert len(launch.numbers) == STEPS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_spare_takes_the_place_of_a_node_lost_in_mid_run_in_the_same_job(
    slurm: Cluster, home: Path, quiet: Numbers, tmp_path: Path
) -> None:
    launch = Launcher(slurm, home, tmp_path, {1: (1, 4, "wait")})
    launch("--nodes", "2", "--spares", "1", *EP2)
    (job,) = launch.jobs
    wait_until(launch.mark.exists, 300, "the fourth update")
    node = launch.mark.read_text()
    assert slurm.run("squeue", "-h", "-j", job, "-o", "%B") != node  # the batch host lives
    slurm.kill_node(node)
    slurm.wait_for(job, "COMPLETED", seconds=300)
    shown = slurm.run("scontrol", "show", "job", job, "--oneliner")
    assert " Restarts=0 " in shown, shown  # it went on in the allocation
    lost, last = read_history(launch.run, f"Slurm job {job}")
    assert lost.outcome in (Outcome.FAILED, Outcome.HUNG)  # srun may say nothing of a node that is gone
    assert (lost.done, lost.message, lost.nodes) == (3, f"no answer any more from {node}", (node,))
    assert last.outcome is Outcome.FINISHED
    assert node not in launch.printed(job).partition("restart 1 of")[2]
    rows = read_lines(launch.run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))  # from the checkpoint of the third
    assert launch.numbers == quiet


# After those of `make_staged_home`: updates 11 and 12.
FOURTH_STAGE = """
[[stages]]
name = "last"
steps = 2
sequence_length = 64
global_batch_size = 4
micro_batch_size = 2
end_lr = 5e-4
lr_shape = "cosine"
rope_theta = 40_000.0
router_bias_update_rate = 0.0
blend = [{ source = "letters" }]
"""
CHAIN_STEPS = STAGED_STEPS + 2


def make_four_stages(folder: Path) -> Path:
    """The staged home with a fourth stage."""
    home = make_staged_home(folder)
    recipe = home / "minuscule.toml"
    text = recipe.read_text()
    assert text.count(f"steps = {STAGED_STEPS}\n") == 1
    recipe.write_text(text.replace(f"steps = {STAGED_STEPS}\n", f"steps = {CHAIN_STEPS}\n") + FOURTH_STAGE)
    return home


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_chain_of_four_stages_ends_through_a_requeue_of_each_and_a_cancelled_job(
    slurm: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    home = make_four_stages(tmp_path / "home")
    up = "time is up"
    plan: Plan = {1: (0, 2, up), 3: (0, 5, up), 4: (0, 6, "wait"), 6: (0, 8, up), 8: (0, 11, up)}
    launch = Launcher(slurm, home, tmp_path, plan)
    launch("--chain")
    warmup, decay, long, last = launch.jobs
    wait_until(launch.mark.exists, 1200, "the second stage, requeued")
    slurm.run("scancel", decay)
    slurm.wait_for(decay, "CANCELLED")
    wait_until(lambda: len(launch.outcomes(decay)) == 2, 60, "its last word")
    for job in (long, last):  # they depend on a stage that did not end
        slurm.wait_for(job, "CANCELLED")
    requeued = [Outcome.STOPPED, Outcome.FINISHED]
    assert launch.outcomes(warmup) == requeued
    assert launch.outcomes(decay) == [Outcome.STOPPED, Outcome.STOPPED]  # it saved before it left
    launch("--chain")
    decay, long, last = launch.jobs
    slurm.wait_for(last, "COMPLETED", seconds=900)
    assert launch.outcomes(decay) == [Outcome.FINISHED]
    assert launch.outcomes(long) == launch.outcomes(last) == requeued
    quiet = train(home, tmp_path / "quiet", ONE)
    assert launch.numbers == numbers(quiet.rows)
    rows = read_lines(launch.run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, CHAIN_STEPS + 1))  # no step was trained twice
