"""`joy launch local` with processes that really train: as a user sees it, on a terminal and on a pipe."""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import local
from megatron_joy.cli.main import main
from megatron_joy.errors import WorkError
from megatron_joy.platform.rendezvous import free_port
from megatron_joy.recipe import load_recipe
from megatron_joy.report.status import read_status
from tests.train.minuscule import EP2, make_home, numbers, read_lines, train

ROOT = Path(__file__).parents[2]
JOY = [sys.executable, "-m", "megatron_joy.cli.main"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and recipe."""
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def reference(home: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, ...]]:
    """The numbers of a run whose ranks were forked."""
    return numbers(train(home, tmp_path_factory.mktemp("forked") / "run", EP2).rows)


def arguments(home: Path, run: Path) -> list[str]:
    """What follows `joy launch local`."""
    return [str(home / "minuscule.toml"), f"run.folder={run}", *EP2]


def environment() -> dict[str, str]:
    """This process's, with the repository in Python's path."""
    return os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}


def test_rendered_commands_run_as_they_are(home: Path, tmp_path: Path, reference: list[tuple[float, ...]]) -> None:
    rendered = subprocess.run(
        [*JOY, "launch", "local", "--render", *arguments(home, tmp_path / "run")],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(rendered) == 2
    assert not (tmp_path / "run").exists()
    words = shlex.split(rendered[1])
    assert {"RANK=1", "WORLD_SIZE=2", "LOCAL_RANK=1", "MASTER_ADDR=127.0.0.1", "OMP_NUM_THREADS=1"} <= set(words)
    port = f"MASTER_PORT={free_port()}"  # the rendered one may be taken where tests run
    first, second = (re.sub(r"MASTER_PORT=\d+", port, line) for line in rendered)
    # By number: `wait -n` knows nothing of a job that has ended before it is called.
    script = f"{first} & one=$!; {second} & two=$!; wait $one && wait $two"
    done = subprocess.run(["bash", "-c", script], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert numbers(read_lines(tmp_path / "run" / "metrics.jsonl")) == reference


def on_a_terminal(command: list[str], interrupt_at: str) -> tuple[int, str]:
    """Runs a command on a pseudo-terminal and types Ctrl-C once a text has appeared: (exit code, all it wrote)."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, environment())
    written, typed = b"", False
    while True:
        try:
            more = os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        written += more
        if not typed and interrupt_at.encode() in written:
            os.write(terminal, b"\x03")
            typed = True
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written.decode()


def test_ctrl_c_checkpoints_and_the_same_command_finishes(
    home: Path, tmp_path: Path, reference: list[tuple[float, ...]]
) -> None:
    run = tmp_path / "run"
    command = [*JOY, "launch", "local", *arguments(home, run)]
    code, screen = on_a_terminal(command, interrupt_at="step 3/8")
    assert code == 75, screen
    assert "starting 2 processes" in screen
    assert "training begins on 2 processes (EP2 DP2)" in screen
    assert "stopping: the ranks finish their step and checkpoint" in screen
    assert "the same command goes on" in screen
    assert "━" in screen  # a bar
    assert "Traceback" not in screen
    assert "KeyboardInterrupt" not in screen
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "\x1b" not in done.stderr  # a pipe gets plain lines
    lines = done.stderr.splitlines()
    assert lines[0] == f"{run}: starting 2 processes"
    assert re.fullmatch(rf"{re.escape(str(run))}: goes on from step_\d+ on 2 processes \(EP2 DP2\)", lines[1])
    assert all(line.startswith("step ") for line in lines[2:-1])
    assert lines[-1].endswith("shows them")
    assert numbers(read_lines(run / "metrics.jsonl")) == reference


def test_a_bug_on_one_rank_ends_all_within_the_grace_and_is_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run, told = tmp_path / "run", tmp_path / "told"
    keep = [sys.executable, "-c", "import sys; open(sys.argv[1], 'ab').write(sys.stdin.buffer.read())", str(told)]
    ours = [*arguments(home, run), f"run.notify.command={json.dumps(keep)}", 'run.notify.on=["error"]']
    monkeypatch.setattr(
        local, "rank_command", lambda *_: [sys.executable, "-m", "tests.launch.failing_rank", *pretrain]
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pretrain = ["pretrain", *ours]
    with pytest.raises(WorkError) as failed:
        local.run_local(load_recipe(ours[0], ours[1:]), ours[0], ours[1:])
    log = run / "logs" / "rank_1.log"
    assert str(failed.value) == f"rank 1: LookupError: a bug that only rank 1 has; the traceback is in {log}"
    assert "Traceback" in log.read_text()
    assert "Traceback" not in capfd.readouterr().err
    failed_at = log.stat().st_mtime
    assert time.time() - failed_at < local.GRACE_SECONDS + 10
    status = read_status(run, now=time.time())
    assert [(error.rank, error.consequence) for error in status.errors] == [(1, False), (0, True)]
    assert status.errors[0].reason == "LookupError: a bug that only rank 1 has"
    assert main(["status", str(run), "--errors"]) == 0
    printed = capfd.readouterr().out
    assert printed.startswith("failed first: rank 1: LookupError: a bug that only rank 1 has")
    assert "because of it: rank 0: " in printed
    assert json.loads(told.read_text())["message"] == "rank 1: LookupError: a bug that only rank 1 has"  # told once


def test_a_killed_rank_is_one_line_and_the_same_command_goes_on(home: Path, tmp_path: Path) -> None:
    """The rank kills itself as the kernel would when memory runs out."""
    run = tmp_path / "run"
    launcher = subprocess.Popen(
        [*JOY, "launch", "local", *arguments(home, run), "train.steps=1000", "schedule.decay_steps=0"],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stderr is not None
    said = []
    for line in launcher.stderr:
        said.append(line)
        if line.startswith("step 4/"):
            os.kill(child_of(launcher.pid, rank="1"), signal.SIGKILL)
    assert launcher.wait() == 1
    errors = [line for line in said if line.startswith("error: ")]
    assert errors == [
        "error: rank 1 was killed by SIGKILL (by the kernel, if memory ran out); its log is "
        f"{run / 'logs' / 'rank_1.log'}\n"
    ]
    assert said[-1] == errors[0]
    assert "Traceback" not in "".join(said)
    first = read_status(run, now=time.time()).errors[0]
    assert (first.rank, first.consequence) == (1, False)
    assert first.reason == "rank 1 was killed by SIGKILL (by the kernel, if memory ran out)"


def child_of(pid: int, rank: str) -> int:
    """The process of a rank that a launcher started."""
    import psutil

    (found,) = [child.pid for child in psutil.Process(pid).children() if child.environ().get("RANK") == rank]
    return found


def test_a_shard_that_lacks_a_byte_is_one_line_on_the_terminal(home: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    own = make_home(tmp_path / "home")
    shard = own / "digits" / "shard_00000.bin"
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    run = tmp_path / "run"
    refused = subprocess.run(
        [*JOY, "launch", "local", *arguments(own, run)], env=environment(), capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    starting, error = refused.stderr.splitlines()
    assert starting == f"{run}: starting 2 processes"
    assert error.startswith(f"error: {shard}: {size - 1} bytes, expected {size} by the manifest")
    assert not run.exists()
