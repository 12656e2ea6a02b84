"""One contract for supervised runs, on this machine and under a real Slurm: how attempts end decides what follows.

The ranks follow a script (tests/launch/supervised_rank.py): nothing here waits for torch.
"""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch import local
from launch.local_place import LocalPlace
from launch.policy import Attempt, Outcome
from launch.supervise import Supervisor, conclude, read_history
from launch.watch import Limits
from megatron_joy.errors import HopelessError, UserError, WorkError
from megatron_joy.recipe import Recipe, load_recipe
from megatron_joy.runstate.lease import read_holder
from tests.slurm_cluster import ROOT, Cluster, wait_until
from tests.train.minuscule import EP2, recipe_tables

RANK = ROOT / "tests" / "launch" / "supervised_rank.py"
LIMITS = Limits(factor=10, least=4, slow=60)
CODES = {UserError: 2, HopelessError: 93, WorkError: 1}
Script = list[list[list[Any]]]  # attempt -> [action, value] in turn
Acts = list[list[Any]]


@dataclass
class Seen:
    """How a launch ended."""

    code: int
    history: list[Attempt]
    printed: str
    run: Path

    @property
    def outcomes(self) -> list[Outcome]:
        return [attempt.outcome for attempt in self.history]


@dataclass
class Here:
    """Two ranks on this machine."""

    run: Path
    recipe: Recipe
    capfd: pytest.CaptureFixture[str]

    def __call__(self, script: Script, restarts: int = 5, ask: Callable[[], bool] | None = None) -> Seen:
        """Launches; sends SIGTERM to the supervisor once `ask` holds."""
        (self.run / "logs").mkdir(parents=True)
        (self.run / "script.json").write_text(json.dumps(script))
        place = LocalPlace(self.recipe, "minuscule", [])
        if ask is not None:
            threading.Thread(target=_term_when, args=(ask,), daemon=True).start()
        try:
            code = conclude(Supervisor(self.run, place, restarts, LIMITS, first_wait=0.1).supervise())
            text = ""
        except (UserError, WorkError) as error:
            code, text = CODES[type(error)], f"error: {error}"
        return Seen(code, read_history(self.run, place.launch), self.capfd.readouterr().err + text, self.run)


def _term_when(holds: Callable[[], bool]) -> None:
    wait_until(holds, 240, "time to stop")
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class Cluster2:
    """Two ranks on two nodes."""

    run: Path
    slurm: Cluster

    def __call__(self, script: Script, restarts: int = 5, ask: Callable[[], bool] | None = None) -> Seen:
        """Submits; sends what Slurm sends before the time is up once `ask` holds."""
        (self.run / "logs").mkdir(parents=True)
        (self.run / "script.json").write_text(json.dumps(script))
        output = self.run.parent / "job.out"
        supervisor = f"{sys.executable} -m launch.in_slurm --run {self.run} --restarts {restarts} --first-wait 0.1"
        limits = f"--hang-factor {LIMITS.factor} --hang-least {LIMITS.least} --hang-slow {LIMITS.slow}"
        batch = self.run.parent / "job.sbatch"
        batch.write_text(
            f"#!/bin/bash\nexec {supervisor} {limits} -- {sys.executable} {RANK} {self.run} {self.run}/script.json\n"
        )
        options = ("--nodes=2", "--ntasks-per-node=1", "--requeue", "--no-kill", "--open-mode=append")
        job = self.slurm.sbatch(*options, f"--output={output}", str(batch))
        if ask is not None:
            wait_until(ask, 240, "time to stop")
            self.slurm.run("scancel", "--batch", "--signal=USR1", job)
        wait_until(lambda: self.slurm.state(job) in ("COMPLETED", "FAILED"), 240, "the job's end")
        shown = self.slurm.run("scontrol", "show", "job", job, "--oneliner")
        code = re.search(r" ExitCode=(\d+):0 ", shown)
        assert code, shown
        return Seen(int(code[1]), read_history(self.run, f"Slurm job {job}"), output.read_text(), self.run)


@pytest.fixture(params=["here", "slurm"])
def launched(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Here | Cluster2:
    """Launches ranks that follow a script."""
    run = tmp_path / "run"
    if request.param == "slurm":
        return Cluster2(run, request.getfixturevalue("slurm"))
    monkeypatch.setattr(local, "GRACE_SECONDS", 2.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, str(RANK), str(run), str(run / "script.json")]
    monkeypatch.setattr(local, "rank_command", lambda *_: command)
    file = tmp_path / "recipe.toml"
    from megatron_joy.recipe import dump_recipe

    file.write_text(dump_recipe(Recipe.model_validate(recipe_tables(tmp_path))))
    return Here(run, load_recipe(str(file), [*EP2, f"run.folder={run}"]), capfd)


Launched = Callable[..., Seen]
END: Acts = [["steps", 12], ["finish", 0]]


def test_failures_kills_and_hangs_are_restarted_until_the_run_is_done(launched: Launched) -> None:
    bug: Acts = [["steps", 3], ["save", 0], ["rank 1", ["fail", [1, "rank 1: KeyError: 'seven'"]]], ["hang", 0.1]]
    killed: Acts = [["steps", 5], ["save", 0], ["rank 1", ["kill", 9]], ["hang", 0.1]]
    frozen: Acts = [["steps", 8], ["save", 0], ["rank 1", ["freeze", 0]], ["hang", 60]]
    seen = launched([bug, killed, frozen, END])
    assert seen.code == 0, seen.printed
    assert seen.outcomes == [Outcome.FAILED, Outcome.FAILED, Outcome.HUNG, Outcome.FINISHED]
    assert [attempt.done for attempt in seen.history] == [3, 5, 8, 12]
    assert seen.history[0].message == "rank 1: KeyError: 'seven'"
    assert re.search(r"rank 1\b.*(SIGKILL|Killed)", seen.history[1].message)
    hang = seen.history[2].message
    silence = r"hangs in step 9: no sign for (?:[4-9]|[1-5]\d) s \(limit 4 s, a step takes 0\.\d\d s in the median\)"
    assert re.match(silence + "; rank 1 ", hang)
    assert re.search(r"is stopped \(SIGSTOP\) after step 8 at supervised_rank.py:\d+ freeze; all stacks are in", hang)
    stacks = (seen.run / "launch" / "hang_000003.txt").read_text()
    assert re.search(r"^rank 0 on \S+ is running after step 8 at supervised_rank.py:\d+ hang$", stacks, re.MULTILINE)
    assert "File" in (seen.run / "logs" / "rank_1.log").read_text()
    holder = read_holder(seen.run)
    assert holder is not None
    assert holder.released
    assert holder.fence == 4


def test_a_stop_is_no_failure_and_a_job_goes_on_by_itself(launched: Launched, tmp_path: Path) -> None:
    mark = tmp_path / "training"
    seen = launched(
        [[["steps", 2], ["rank 0", ["touch", str(mark)]], ["steps", 1000]], END], restarts=0, ask=mark.exists
    )
    if isinstance(launched, Here):
        assert (seen.code, seen.outcomes) == (75, [Outcome.STOPPED])
    else:  # requeued
        assert (seen.code, seen.outcomes) == (0, [Outcome.STOPPED, Outcome.FINISHED])
        assert "supervisor: Slurm job" in seen.printed
    assert 2 < seen.history[0].done < 1000


@pytest.mark.parametrize(
    ("acts", "code", "attempts", "says"),
    [
        ([["rank 1", ["fail", [2, "data.train: no such shard"]]], ["hang", 0.1]], 2, 1, "data.train: no such shard"),
        ([["rank 0", ["fail", [93, "weights are NaN"]]], ["hang", 0.1]], 93, 1, "a restart would end the same way"),
        (
            [["steps", 2], ["rank 1", ["fail", [1, "a bug"]]], ["hang", 0.1]],
            93,
            3,
            "in a row failed without a new step",
        ),
    ],
    ids=["mistake", "hopeless", "fruitless"],
)
def test_what_a_restart_cannot_mend_is_not_restarted(
    launched: Launched, acts: Acts, code: int, attempts: int, says: str
) -> None:
    seen = launched([acts] * 5)
    assert (seen.code, len(seen.history)) == (code, attempts), seen.printed
    errors = [line for line in seen.printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert says in errors[0]
