"""Starts a run's ranks on this machine and looks after them until all are gone."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from megatron_joy.data.manifest import load_manifest
from megatron_joy.errors import UserError
from megatron_joy.recipe import Recipe

EXIT_FINISHED, EXIT_FAILED, EXIT_USER_MISTAKE, EXIT_STOPPED = 0, 1, 2, 75
GRACE_SECONDS = 20.0  # between the first failed rank (or a stop) and killing the others
POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


def check_data(recipe: Recipe) -> None:
    """Refuses with UserError a recipe whose manifests can't be read, before any process starts."""
    if not recipe.data.train:
        raise UserError("data.train: no source is given, expected at least one; add [[data.train]] with a manifest")
    for entry in [*recipe.data.train, *recipe.data.validation]:
        load_manifest(Path(entry.manifest))


def rank_command(recipe_name: str, overrides: Sequence[str]) -> list[str]:
    """The command of every rank."""
    return [sys.executable, "-m", "megatron_joy.cli.main", "pretrain", recipe_name, *overrides]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What tells a rank its place; the names are torchrun's."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """In the child, before exec: a killed launcher must not leave ranks behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class World:
    """The ranks' processes. Rank 0 has the terminal; the others write to logs/rank_N.log."""

    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]
    deadline: float | None = None
    stopping: bool = False
    first_failure: int | None = None
    _before: dict[int, object] = field(default_factory=dict)

    def forward_signals(self) -> None:
        """SIGTERM and Ctrl-C ask every rank to checkpoint and leave; a second one kills them."""

        def ask(number: int, frame: FrameType | None) -> None:
            for process in self.processes:
                if process.poll() is None:
                    process.kill() if self.stopping else process.send_signal(signal.SIGTERM)
            self.stopping = True

        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, ask)

    def wait(self) -> int:
        """Waits for all ranks; after the first failure the others get GRACE_SECONDS. Returns the launcher's exit code."""
        while any(process.poll() is None for process in self.processes):
            self._note_failure()
            if self.deadline is not None and time.monotonic() > self.deadline:
                for process in self.processes:
                    if process.poll() is None:
                        process.kill()
            time.sleep(POLL_SECONDS)
        self._note_failure()
        codes = [process.returncode for process in self.processes]
        if self.first_failure is not None:
            return EXIT_USER_MISTAKE if codes[self.first_failure] == EXIT_USER_MISTAKE else EXIT_FAILED
        return EXIT_STOPPED if EXIT_STOPPED in codes else EXIT_FINISHED

    def _note_failure(self) -> None:
        if self.first_failure is None:
            failed = [
                rank
                for rank, process in enumerate(self.processes)
                if process.poll() not in (None, EXIT_FINISHED, EXIT_STOPPED)
            ]
            if failed:
                self.first_failure = failed[0]
                self.deadline = time.monotonic() + GRACE_SECONDS

    def failure_summary(self) -> str | None:
        """The first failing rank, how it ended and the end of what it said; None when nothing failed."""
        if self.first_failure is None:
            return None
        rank, code = self.first_failure, self.processes[self.first_failure].returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
        tail = self.logs[rank].read_text(errors="replace").splitlines()[-1:] if self.logs[rank].exists() else []
        said = f": {tail[0]}" if tail else ""
        return f"rank {rank} {how}{said} (see {self.logs[rank]})"


def start(recipe: Recipe, recipe_name: str, overrides: Sequence[str]) -> World:
    """Starts all ranks of a recipe."""
    size, port = recipe.layout.world_size, free_port()
    folder = Path(recipe.run.folder or "") / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"rank_{rank}.log" for rank in range(size)]
    threads = {} if recipe.train.threads else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // size))}
    processes = []
    for rank, log in enumerate(logs):
        with open(log, "ab") as output:
            processes.append(
                subprocess.Popen(
                    rank_command(recipe_name, overrides),
                    env=os.environ | threads | rank_environment(rank, size, port),
                    stdout=None if rank == 0 else output,
                    stderr=None if rank == 0 else output,
                    stdin=subprocess.DEVNULL,
                    preexec_fn=_die_with_parent,
                )
            )
    return World(processes, logs)


def run_local(recipe: Recipe, recipe_name: str, overrides: Sequence[str]) -> int:
    """Runs a recipe's world to its end on this machine: 0 done, 75 stopped as asked, 2 a user's mistake, 1 failed."""
    check_data(recipe)
    world = start(recipe, recipe_name, overrides)
    world.forward_signals()
    code = world.wait()
    summary = world.failure_summary()
    # A user's mistake was already said by rank 0, in one line.
    if summary is not None and code == EXIT_FAILED:
        print(f"error: {summary}", file=sys.stderr)
    return code
