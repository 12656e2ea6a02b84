"""`joy launch mpi`: a real mpiexec (the mpich wheel) starts ranks that train, and how they end is said once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import local, mpi
from launch.mpi import Ended, Mpi
from launch.reasons import MARK
from launch.watch import Limits
from megatron_joy.errors import UserError, WorkError
from megatron_joy.recipe import Recipe, load_recipe
from megatron_joy.runstate import FENCE_VARIABLE
from tests.train.minuscule import EP2, make_home, numbers, read_lines, train

ROOT = Path(__file__).parents[2]
STUB = Path(__file__).with_name("stub_rank.py")
BEATING = Path(__file__).with_name("supervised_rank.py")
Script = list[list[list[Any]]]  # rank -> [action, value] in turn


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and recipe."""
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def recipe(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe of two ranks, whose grace is short."""
    monkeypatch.setattr(mpi, "GRACE_SECONDS", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return load_recipe(str(home / "minuscule.toml"), [*EP2, f"run.folder={tmp_path / 'run'}"])


@pytest.fixture
def play(recipe: Recipe, tmp_path: Path) -> Callable[[Script], int]:
    """Launches ranks that follow a script; the exit code."""

    def launch(script: Script) -> int:
        path = tmp_path / "script.json"
        path.write_text(json.dumps(script))
        return mpi.run_mpi(recipe, [sys.executable, str(STUB), str(path)], Mpi())

    return launch


Play = Callable[[Script], int]


def test_ranks_under_mpiexec_train_as_forked_ones_do_and_stop_as_asked(home: Path, tmp_path: Path) -> None:
    expected = numbers(train(home, tmp_path / "forked", EP2).rows)
    run = tmp_path / "run"
    words = ["launch", "mpi", str(home / "minuscule.toml"), f"run.folder={run}", *EP2]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "megatron_joy.cli.main", *words]
    launcher = subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, text=True)
    assert launcher.stderr is not None
    lines = []
    for line in launcher.stderr:
        lines.append(line)
        if line.startswith("step 2/"):
            launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 75, "".join(lines)
    assert not any("====" in line or "joy reason" in line for line in lines)
    done = numbers(read_lines(run / "metrics.jsonl"))
    assert 2 <= len(done) < len(expected)
    assert done == expected[: len(done)]
    # Both ranks left whole: rank 0 wrote its last word after the checkpoint.
    assert [event["kind"] for event in read_lines(run / "events.jsonl")][-2:] == ["checkpoint", "stop"]


def test_what_the_first_failing_rank_says_is_said_once(play: Play, capfd: pytest.CaptureFixture[str]) -> None:
    last = ["tell", [1, "rank 0: RuntimeError: Connection closed by peer"]]
    with pytest.raises(WorkError, match=r"^rank 1: no such expert$"):
        play([[["sleep", 0.5], last, ["exit", 1]], [["tell", [1, "rank 1: no such expert"]], ["exit", 1]]])
    assert "joy reason" not in capfd.readouterr().err


def test_a_users_mistake_keeps_its_kind(play: Play) -> None:
    with pytest.raises(UserError, match=r"^no such shard$"):
        play([[["tell", [2, "no such shard"]], ["exit", 2]]] * 2)


def test_the_others_of_a_failed_rank_are_ended(play: Play) -> None:
    began = time.monotonic()
    with pytest.raises(WorkError, match=r"^rank 1: a bug$"):
        play([[["ignore_term", None], ["sleep", 200]], [["tell", [1, "rank 1: a bug"]], ["exit", 1]]])
    assert time.monotonic() - began < 150  # they would have slept for longer


def test_a_rank_that_a_signal_killed_is_the_cause(play: Play, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkError, match=r"^a rank was killed by SIGKILL \(by the kernel, if memory ran out\)$"):
        play([[["sleep", 60]], [["kill", int(signal.SIGKILL)]]])
    assert "BAD TERMINATION" not in "".join(capfd.readouterr())


def test_a_rank_that_leaves_without_a_word_is_quoted(play: Play) -> None:
    complains = ["complain", "ImportError: no torch"]
    with pytest.raises(WorkError, match=r"^a rank left with exit code 3: ImportError: no torch$"):
        play([[["exit", 0]], [complains, ["exit", 3]]])


def test_a_second_signal_ends_ranks_that_do_not_stop(play: Play, tmp_path: Path) -> None:
    def twice() -> None:
        while not all((tmp_path / f"pid_{rank}").exists() for rank in (0, 1)):
            time.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    threading.Thread(target=twice, daemon=True).start()
    deaf = [["ignore_term", None], ["note_pid", str(tmp_path)], ["sleep", 60]]
    with pytest.raises(WorkError, match="killed before the ranks could checkpoint"):
        play([deaf, deaf])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_rank_that_stops_is_named_with_its_stack(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, script = tmp_path / "run", tmp_path / "script.json"
    run.mkdir()
    script.write_text(json.dumps([[["steps", 8], ["rank 1", ["freeze", 0]], ["hang", 200]]]))
    monkeypatch.setattr(local, "LIMITS", Limits(factor=10, least=2, slow=60))
    monkeypatch.setenv(FENCE_VARIABLE, str(local.UNSUPERVISED))
    with pytest.raises(WorkError, match=r"^hangs in step 9: no sign for \d+ s .*; rank 1 on ") as hung:
        mpi.run_mpi(recipe, [sys.executable, str(BEATING), str(run), str(script)], Mpi())
    assert "is stopped (SIGSTOP) after step 8 at supervised_rank.py:" in str(hung.value)
    assert str(hung.value).endswith("hang_000000.txt; the same command goes on from the last checkpoint")


PLACE = ("10.0.0.1", 29500)


def words(recipe: Recipe, dialect: mpi.Dialect, how: Mpi) -> list[str]:
    return mpi.command(recipe, ["python", "rank.py"], "start", dialect, how, PLACE)


def test_each_starter_is_given_ranks_nodes_and_meeting_place_in_its_own_words(recipe: Recipe) -> None:
    two = Mpi(nodes=2, hosts=Path("hosts"))
    hydra, openmpi = words(recipe, "hydra", two), words(recipe, "openmpi", two)
    assert hydra[:7] == ["start", "-n", "2", "-ppn", "1", "-f", "hosts"]
    assert hydra[7:10] == ["-genv", "MASTER_ADDR", "10.0.0.1"]
    assert openmpi[:5] == ["start", "-n", "2", "--map-by", "ppr:1:node:OVERSUBSCRIBE"]
    assert {"MASTER_ADDR=10.0.0.1", "MASTER_PORT=29500"} <= set(openmpi)
    srun = words(recipe, "srun", Mpi(nodes=2, srun="pmi2"))
    assert srun[:5] == ["start", "--mpi=pmi2", "--ntasks=2", "--nodes=2", "--ntasks-per-node=1"]
    assert all(line[-2:] == ["python", "rank.py"] for line in (hydra, openmpi, srun))
    with pytest.raises(UserError, match=r"--nodes 3: 2 ranks don't spread evenly over them; the nearest is 2"):
        words(recipe, "hydra", Mpi(nodes=3))


def test_rank_0s_node_is_looked_up_and_never_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "look_up", lambda host: {"n1": "10.0.0.1"}[host])
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\n\nn1:4\nn2:4\n")
    assert mpi.meeting_place(Mpi(2, hosts), {}) == "10.0.0.1"
    assert mpi.meeting_place(Mpi(2), {"SLURM_JOB_NODELIST": "n[1-2]"}) == "10.0.0.1"
    assert mpi.meeting_place(Mpi(1), {}) == "127.0.0.1"
    with pytest.raises(UserError, match="--nodes 2: no hosts are known"):
        mpi.meeting_place(Mpi(2), {})
    hosts.write_text("# none\n")
    with pytest.raises(UserError, match="names no host"):
        mpi.meeting_place(Mpi(2, hosts), {})
    with pytest.raises(UserError, match=r"--hosts .*: No such file"):
        mpi.meeting_place(Mpi(2, tmp_path / "absent"), {})


def ended(lines: list[str]) -> Ended:
    found = Ended()
    for line in lines:
        found.hear(line)
    return found


def test_open_mpis_and_sruns_words_name_the_rank() -> None:
    killed = ended(
        ["prterun noticed that process rank 1 with PID 7 on node vm exited on", "signal 9 (Killed)."]
    ).failure()
    assert killed is not None
    assert killed.message == "rank 1 was killed by SIGKILL (by the kernel, if memory ran out)"
    left = ended(["my last words", "   Process name: [prterun-vm-22687@1,1]", "   Exit code:    3"])
    assert left.failure() is None
    assert left.left(3) == "rank 1 left with exit code 3: my last words"
    torn = ended([f"{MARK.decode()}{{torn"])
    assert torn.reasons == []


def test_no_mpiexec_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi.shutil, "which", lambda name, path=None: None)
    with pytest.raises(UserError, match=r"no mpiexec or mpirun in PATH; pip install -e '.\[mpi\]', or load a module"):
        mpi.find_starter(Mpi())
    with pytest.raises(UserError, match="no srun in PATH"):
        mpi.find_starter(Mpi(srun="pmi2"))
