"""Starts a run's ranks on this machine and looks after them until all are gone."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from launch.policy import EXIT_HOPELESS
from launch.reasons import FOLDER_VARIABLE, VARIABLE, Reason, Reasons
from launch.stacks import collect, keep, speak_for
from launch.watch import Limits, Watch, seconds_between_looks
from megatron_joy.data.caps import check_epochs
from megatron_joy.data.manifest import load_manifest
from megatron_joy.errors import HopelessError, UserError, WorkError
from megatron_joy.platform.rendezvous import free_port
from megatron_joy.recipe import Recipe, check_run_folder
from megatron_joy.runstate import FENCE_VARIABLE
from megatron_joy.runstate.heartbeat import node_name, read_beats
from megatron_joy.runstate.lease import refuse_if_held

EXIT_FINISHED, EXIT_FAILED, EXIT_USER_MISTAKE, EXIT_STOPPED = 0, 1, 2, 75
GRACE_SECONDS = 20.0  # between the first failed rank and killing the others
POLL_SECONDS = 0.05
LIMITS = Limits()  # of a hang
UNSUPERVISED = 0  # the number of every attempt that no supervisor counts
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

SIGNAL_HINTS = {
    signal.SIGKILL: " (by the kernel, if memory ran out)",
    signal.SIGTERM: " before it could listen to it",
}


def check(recipe: Recipe, launch: str = "") -> None:
    """Refuses with UserError, before any process starts: a manifest that can't be read, a folder of another run, one
    that is trained by another launch than `launch` now.
    """
    if not recipe.data.train:
        raise UserError("data.train: no source is given, expected at least one; add [[data.train]] with a manifest")
    for entry in [*recipe.data.train, *recipe.data.validation]:
        load_manifest(Path(entry.manifest))
    check_epochs(recipe)
    check_run_folder(recipe)
    refuse_if_held(Path(recipe.run.folder or ""), launch)


def rank_command(recipe_name: str, overrides: Sequence[str]) -> list[str]:
    """The command of every rank."""
    return [sys.executable, "-m", "megatron_joy.cli.main", "pretrain", recipe_name, *overrides]


def rank_environment(recipe: Recipe, rank: int, port: int) -> dict[str, str]:
    """What tells a rank its place; the names are torchrun's."""
    size = recipe.layout.world_size
    threads = recipe.train.threads or max(1, (os.cpu_count() or 1) // size)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
    }


@dataclass
class World:
    """The ranks' processes.

    Rank 0 has the terminal. What the others print is kept in `output`, files without a name, until they open
    logs/rank_N.log themselves: a run that is refused must leave nothing behind.
    """

    processes: list[subprocess.Popen[bytes]]
    output: list[IO[bytes] | None]
    reasons: Reasons
    logs: Path
    failure: Reason | None = None
    asked_to_stop: bool = False
    cut_short: bool = False
    _told: list[Reason] = field(default_factory=list)
    _deadline: float | None = None

    @contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask every rank to checkpoint and leave; a second one kills them."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked_to_stop:
                self.cut_short = True
                self.kill()
                return
            self.ask_to_stop()
            # Not through sys.stderr: the handler may have interrupted a write to it. On a terminal a bar is in the way.
            message = b"stopping: the ranks finish their step and checkpoint; a second signal kills them\n"
            os.write(2, b"\n" + message if os.isatty(2) else message)

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def wait(self) -> None:
        """Until all ranks are gone; after the first failure the others get GRACE_SECONDS."""
        while self.running():
            time.sleep(POLL_SECONDS)

    def running(self) -> bool:
        """Whether a rank is left, now that one was looked after: call it often."""
        left = bool(self._running())  # before the look, which then sees how the last one ended
        self._look()
        if left and self._deadline is not None and time.monotonic() > self._deadline:
            self.kill()
        return left

    def ask_to_stop(self) -> None:
        """Asks every rank to checkpoint and leave."""
        self.asked_to_stop = True
        for process in self._running():
            process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends what still runs with SIGKILL."""
        for process in self._running():
            process.kill()

    def exit_codes(self) -> list[int | None]:
        """Of each rank; None while it runs, negative when a signal killed it."""
        return [process.poll() for process in self.processes]

    def _running(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self.processes if process.poll() is None]

    def _look(self) -> None:
        """Notes the first failure and begins the others' time of grace."""
        codes = self.exit_codes()
        if told := self.reasons.received():
            self._told += told
            codes = self.exit_codes()  # anew: the death of which a rank complains came before its complaint
        if self.failure is None and not self.cut_short:
            self.failure = self._first_failure(codes)
        left_early = self.asked_to_stop and -signal.SIGTERM in codes
        if self._deadline is None and (self.failure is not None or left_early):
            self._deadline = time.monotonic() + GRACE_SECONDS

    def _first_failure(self, codes: Sequence[int | None]) -> Reason | None:
        """A rank that a signal killed is the cause of what the others say; else the first that said why it leaves."""
        in_order = [EXIT_FINISHED, EXIT_STOPPED, None, *([-signal.SIGTERM] if self.asked_to_stop else [])]
        failed = [(rank, code) for rank, code in enumerate(codes) if code not in in_order and code is not None]
        for rank, code in failed:
            if code < 0:
                hint = SIGNAL_HINTS.get(signal.Signals(-code), "")
                return Reason(rank, EXIT_FAILED, f"rank {rank} was killed by {signal.Signals(-code).name}{hint}")
        if self._told:
            return self._told[0]
        for rank, code in failed:
            return Reason(rank, EXIT_FAILED, f"rank {rank} left with exit code {code}{self._last_words(rank)}")
        return None

    def _last_words(self, rank: int) -> str:
        lines = self._printed(rank).decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f": {last}" if last else ""

    def _printed(self, rank: int) -> bytes:
        file = self.output[rank]
        if file is None:
            return b""
        file.seek(0)
        return file.read()

    def keep_output(self) -> None:
        """Appends what ranks printed before they had a log to logs/rank_N.log."""
        for rank in range(len(self.processes)):
            if printed := self._printed(rank):
                self.logs.mkdir(parents=True, exist_ok=True)
                with open(self.logs / f"rank_{rank}.log", "ab") as log:
                    log.write(printed)


def start(
    recipe: Recipe, recipe_name: str, overrides: Sequence[str], words: Sequence[str] = (), fence: int = UNSUPERVISED
) -> World:
    """Starts all ranks of a recipe, with another command than training's where `words` gives one.

    fence: the number of the attempt, when a supervisor counts them.
    """
    port, launcher, reasons = free_port(), os.getpid(), Reasons()

    def in_child() -> None:
        """Before exec: a killed launcher leaves no rank behind, and Ctrl-C is for the launcher to pass on."""
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(EXIT_FAILED)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    own = {VARIABLE: str(reasons.descriptor), FOLDER_VARIABLE: "", FENCE_VARIABLE: str(fence)}
    processes: list[subprocess.Popen[bytes]] = []
    output: list[IO[bytes] | None] = []
    for rank in range(recipe.layout.world_size):
        output.append(tempfile.TemporaryFile() if rank else None)  # noqa: SIM115 (open as long as the ranks run)
        processes.append(
            subprocess.Popen(
                words or rank_command(recipe_name, overrides),
                env=os.environ | rank_environment(recipe, rank, port) | own,
                stdin=subprocess.DEVNULL,
                stdout=output[rank],
                stderr=output[rank],
                pass_fds=[reasons.descriptor],
                preexec_fn=in_child,
            )
        )
    return World(processes, output, reasons, Path(recipe.run.folder or "") / "logs")


def wait_or_end(
    running: Callable[[], bool], failed: Callable[[], bool], end: Callable[[], object], watch: Watch
) -> str:
    """Until no rank is running: the line about a hang, for which they were ended; nothing without one.

    `running` is called often. What hangs once a rank has `failed` waits for that rank, and is ended for that.
    """
    hang, looked = "", time.monotonic()
    while running():
        time.sleep(POLL_SECONDS)
        if hang or failed() or time.monotonic() - looked < seconds_between_looks(watch.limits):
            continue
        looked = time.monotonic()
        if hang := watch.look() or "":
            hang = keep(watch.run, watch.fence, hang, collect(watch.run, watch.fence, node_name(), watch.stale))
            end()
    return hang


def unsupervised(recipe: Recipe) -> Watch:
    """A watch over the attempt that is about to start, which no supervisor numbers: older heartbeats are not its."""
    run = Path(recipe.run.folder or "")
    return Watch(run, UNSUPERVISED, LIMITS, read_beats(run, UNSUPERVISED))


def hung(hang: str) -> WorkError:
    """What a launch ends with that nobody restarts."""
    return WorkError(f"{hang}; the same command goes on from the last checkpoint")


def run_local(recipe: Recipe, recipe_name: str, overrides: Sequence[str]) -> int:
    """Runs a recipe's world to its end on this machine. Returns 0 when all steps are done, 75 when stopped as asked.

    Raises UserError for a mistake that the ranks found and WorkError when one failed: what the first one said.
    """
    check(recipe)
    size = recipe.layout.world_size
    print(f"{recipe.run.folder}: starting {size} process{'es' if size > 1 else ''}", file=sys.stderr)
    watch = unsupervised(recipe)
    world = start(recipe, recipe_name, overrides)
    with world.forwarding_signals():
        hang = wait_or_end(world.running, lambda: world.failure is not None, world.kill, watch)
    world.reasons.close()
    if hang:
        world.keep_output()
        raise hung(hang)
    if world.cut_short:
        raise WorkError("killed before the ranks could checkpoint; the same command goes on from the last checkpoint")
    if world.failure is None:
        return EXIT_FINISHED if set(world.exit_codes()) == {EXIT_FINISHED} else EXIT_STOPPED
    if world.failure.exit_code == EXIT_USER_MISTAKE:
        raise UserError(world.failure.message)
    world.keep_output()
    log = world.logs / f"rank_{world.failure.rank}.log"
    said = world.failure.message
    if (world.exit_codes()[world.failure.rank] or 0) < 0:
        speak_for(world.failure.rank, log, said)
    kind = HopelessError if world.failure.exit_code == EXIT_HOPELESS else WorkError
    raise kind(said if str(log) in said or not log.exists() else f"{said}; its log is {log}")
