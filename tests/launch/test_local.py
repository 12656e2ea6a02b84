"""The launcher and its ranks, which follow scripts here: how they end is how it ends, said once, with nobody left."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch import local
from launch.reasons import VARIABLE, Reason, Reasons, tell_launcher
from launch.watch import Limits
from megatron_joy.errors import UserError, WorkError
from megatron_joy.recipe import Recipe, dump_recipe, load_recipe
from megatron_joy.runstate.heartbeat import Heart
from tests.train.minuscule import EP2, make_home

ROOT = Path(__file__).parents[2]
STUB = Path(__file__).with_name("stub_rank.py")
BEATING = Path(__file__).with_name("supervised_rank.py")
Script = list[list[list[Any]]]  # rank -> [action, value] in turn


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe of two ranks, whose grace is short."""
    monkeypatch.setattr(local, "GRACE_SECONDS", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "home").mkdir()
    home = make_home(tmp_path / "home")
    return load_recipe(str(home / "minuscule.toml"), [*EP2, f"run.folder={tmp_path / 'run'}"])


@pytest.fixture
def play(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], int]:
    """Launches ranks that follow a script; the exit code."""

    def launch(script: Script) -> int:
        path = tmp_path / "script.json"
        path.write_text(json.dumps(script))
        monkeypatch.setattr(local, "rank_command", lambda *_: [sys.executable, str(STUB), str(path)])
        return local.run_local(recipe, "minuscule", [])

    return launch


Play = Callable[[Script], int]


def test_ranks_that_finish_are_a_finished_run(play: Play, tmp_path: Path) -> None:
    assert play([[["exit", 0]], [["exit", 0]]]) == 0
    assert not (tmp_path / "run").exists()  # what is in a run's folder, the ranks write


def test_ranks_that_were_stopped_are_a_stopped_run(play: Play) -> None:
    assert play([[["exit", 75]], [["exit", 75]]]) == 75


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_with_its_signal_and_the_others_are_ended(play: Play, victim: int) -> None:
    script: Script = [[["sleep", 60]], [["sleep", 60]]]
    script[victim] = [["sleep", 0.3], ["kill", int(signal.SIGKILL)]]
    before = psutil.Process().children()  # the test process may have helpers of its own
    with pytest.raises(WorkError) as failed:
        play(script)
    assert str(failed.value) == f"rank {victim} was killed by SIGKILL (by the kernel, if memory ran out)"
    assert set(psutil.Process().children()) <= set(before)


def test_a_killed_rank_is_the_cause_of_what_others_say_at_once(play: Play, tmp_path: Path) -> None:
    started, died = (["wait_for", str(tmp_path / "pid_1")], ["outlive", str(tmp_path / "pid_1")])
    said = ["tell", [1, "rank 0: RuntimeError: Connection closed by peer"]]
    with pytest.raises(WorkError, match=r"^rank 1 was killed by SIGABRT$"):
        play([[started, died, said, ["exit", 1]], [["note_pid", str(tmp_path)], ["kill", int(signal.SIGABRT)]]])


def test_the_first_reason_is_said_whatever_rank_it_comes_from(play: Play, tmp_path: Path) -> None:
    first: list[list[Any]] = [["tell", [1, "rank 1: KeyError: 'seven'"]], ["note_pid", str(tmp_path)], ["exit", 1]]
    second: list[list[Any]] = [["wait_for", str(tmp_path / "pid_1")], ["tell", [1, "rank 0: lost"]], ["exit", 1]]
    with pytest.raises(WorkError, match=r"^rank 1: KeyError: 'seven'$"):
        play([second, first])


def test_a_rank_that_told_its_reason_and_hangs_is_ended(play: Play) -> None:
    started = time.monotonic()
    with pytest.raises(WorkError, match=r"^rank 1: it hangs$"):
        play([[["sleep", 200]], [["tell", [1, "rank 1: it hangs"]], ["sleep", 200]]])
    assert time.monotonic() - started < 150  # they would have slept for longer


def test_a_users_mistake_is_raised_once_and_nothing_is_written(play: Play, tmp_path: Path) -> None:
    mistake: list[list[Any]] = [["tell", [2, "data.train: cut short"]], ["print", "noise"], ["exit", 2]]
    with pytest.raises(UserError, match=r"^data.train: cut short$"):
        play([mistake, mistake])
    assert not (tmp_path / "run").exists()


def test_a_mistake_that_one_rank_alone_found_is_said(play: Play) -> None:
    with pytest.raises(UserError, match=r"^no such shard$"):
        play([[["sleep", 60]], [["tell", [2, "no such shard"]], ["exit", 2]]])


def test_a_rank_that_leaves_without_a_word_is_quoted_and_its_output_kept(play: Play, tmp_path: Path) -> None:
    with pytest.raises(WorkError) as failed:
        play([[["sleep", 60]], [["print", "first"], ["print", "ImportError: no torch"], ["exit", 3]]])
    log = tmp_path / "run" / "logs" / "rank_1.log"
    assert str(failed.value) == f"rank 1 left with exit code 3: ImportError: no torch; its log is {log}"
    assert log.read_text() == "first\nImportError: no torch\n"


def _left_behind(run: Path, rank: int, pid: int) -> None:
    """An earlier attempt's heartbeat in the midst of a step, whose process number is another process's by now."""
    heart = Heart(run, rank, local.UNSUPERVISED)
    heart._pid = pid
    for done in range(3):
        heart.beat(done, "step")


def test_a_rank_that_stops_is_named_with_its_stack_without_a_supervisor_too(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, script = tmp_path / "run", tmp_path / "script.json"
    run.mkdir()
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    for rank in (0, 7):
        _left_behind(run, rank, stranger.pid)
    script.write_text(json.dumps([[["sleep", 3], ["steps", 8], ["rank 1", ["freeze", 0]], ["hang", 200]]]))
    monkeypatch.setattr(local, "LIMITS", Limits(factor=10, least=2, slow=60))
    monkeypatch.setattr(local, "rank_command", lambda *_: [sys.executable, str(BEATING), str(run), str(script)])
    with pytest.raises(WorkError) as hung:
        local.run_local(recipe, "minuscule", [])
    said = str(hung.value)
    assert re.match(
        r"hangs in step 9: no sign for \d+ s \(limit 2 s, a step takes 0\.\d\d s in the median\); rank 1 on ", said
    )
    assert re.search(r"is stopped \(SIGSTOP\) after step 8 at supervised_rank.py:\d+ freeze; all stacks are in ", said)
    assert said.endswith(f"{run / 'launch' / 'hang_000000.txt'}; the same command goes on from the last checkpoint")
    stacks = (run / "launch" / "hang_000000.txt").read_text()
    assert re.search(r"^rank 0 on \S+ is running after step 8 at supervised_rank.py:\d+ hang$", stacks, re.MULTILINE)
    assert "rank 7" not in stacks
    log = (run / "logs" / "rank_1.log").read_text()  # where `joy status` looks for reasons
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank 1 failed\nhangs in step 9: ", log, re.MULTILINE)
    assert stranger.poll() is None  # nobody signalled it
    stranger.kill()


def send(*signals: int, when: Callable[[], bool] = lambda: True) -> None:
    """Sends signals to this process, in turn, as soon as it is a launcher that listens and `when` holds."""

    def listening() -> bool:
        return signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL and when()

    def work() -> None:
        wait_until(listening)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    threading.Thread(target=work, daemon=True).start()


def all_there(folder: Path) -> bool:
    """Whether both ranks have come to their `note_pid`."""
    return all((folder / f"pid_{rank}").exists() for rank in (0, 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_to_every_rank_as_sigterm(
    play: Play, tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    listens: list[list[Any]] = [["ignores_interrupts", 5], ["checkpoint_on_term", 75], ["note_pid", str(tmp_path)]]
    send(number, when=lambda: all_there(tmp_path))
    assert play([[*listens, ["sleep", 60]]] * 2) == 75
    assert "stopping: the ranks finish their step and checkpoint" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # handlers are put back


def test_a_second_signal_kills_and_says_what_that_means(play: Play, tmp_path: Path) -> None:
    deaf: list[list[Any]] = [["ignore_term", None], ["note_pid", str(tmp_path)], ["sleep", 60]]
    send(signal.SIGINT, signal.SIGINT, when=lambda: all_there(tmp_path))
    with pytest.raises(WorkError, match="killed before the ranks could checkpoint"):
        play([deaf, deaf])


def test_a_stop_before_a_rank_listens_is_a_stop(play: Play, tmp_path: Path) -> None:
    send(signal.SIGTERM, when=lambda: (tmp_path / "pid_1").exists())
    waits: list[list[Any]] = [["checkpoint_on_term", 75], ["sleep", 60]]
    assert play([waits, [["note_pid", str(tmp_path)], ["sleep", 60]]]) == 75


def test_a_killed_launcher_leaves_no_rank_behind(recipe: Recipe, tmp_path: Path) -> None:
    script = tmp_path / "script.json"
    script.write_text(json.dumps([[["note_pid", str(tmp_path)], ["sleep", 60]]] * 2))
    file = tmp_path / "resolved.toml"
    file.write_text(dump_recipe(recipe))
    launcher = subprocess.Popen([sys.executable, str(STUB), "--launch", str(file), str(script)], cwd=ROOT)
    pids = [tmp_path / f"pid_{rank}" for rank in (0, 1)]
    wait_until(lambda: all_there(tmp_path) and all(path.read_text() for path in pids))
    ranks = [int(path.read_text()) for path in pids]
    assert all(psutil.pid_exists(pid) for pid in ranks)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(running(pid) for pid in ranks))


def running(pid: int) -> bool:
    """Whether a process is there and not just waiting to be buried."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Raises AssertionError when it doesn't hold in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_ranks_know_their_place(recipe: Recipe) -> None:
    places = [local.rank_environment(recipe, rank, 4711) for rank in (0, 1)]
    assert [place["RANK"] for place in places] == ["0", "1"]
    assert all(place["WORLD_SIZE"] == "2" and place["MASTER_PORT"] == "4711" for place in places)
    assert places[0]["OMP_NUM_THREADS"] == "1"  # the recipe's threads


def test_bad_data_and_a_changed_recipe_are_refused_before_any_process_starts(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("a process was started")

    monkeypatch.setattr(local, "start", never)
    overrides = [f"run.folder={tmp_path / 'run'}", *EP2]
    file = str(tmp_path / "home" / "minuscule.toml")
    with pytest.raises(UserError, match=r"^data.train: no source"):
        local.run_local(load_recipe(file, [*overrides, "data.train=[]"]), file, [])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(dump_recipe(recipe))
    with pytest.raises(UserError, match=r"model.hidden_size \(32 -> 64\)"):
        local.run_local(load_recipe(file, [*overrides, "model.hidden_size=64"]), file, [])


def test_reasons_come_in_the_order_told_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = Reasons()
    monkeypatch.setenv(VARIABLE, str(reasons.descriptor))
    told = [Reason(rank, 1, message) for rank, message in ((3, "first"), (0, "zwölf\nlines"), (1, "x" * 10_000))]
    assert all(tell_launcher(reason) for reason in told)
    received = reasons.received()
    assert received[:2] == told[:2]
    assert received[2].message == "x" * 3000
    assert tell_launcher(Reason(2, 1, "文" * 5000))
    assert reasons.received()[0].message.startswith("文文")
    assert reasons.received() == []
    reasons.close()


@pytest.mark.parametrize("descriptor", ["", "0x", "917"])
def test_without_a_launcher_nobody_is_told(monkeypatch: pytest.MonkeyPatch, descriptor: str) -> None:
    monkeypatch.setenv(VARIABLE, descriptor)
    assert not tell_launcher(Reason(0, 1, "unheard"))
