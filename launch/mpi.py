"""Starts a run's ranks with mpiexec (MPICH's Hydra, Open MPI) or `srun --mpi`, and says how they ended, once.

The ranks speak gloo or NCCL with each other; MPI only starts them, and passes on what they print. So their reasons come
as marked lines of stderr. Hydra passes SIGTERM on to them; Open MPI and srun kill them for that, and pass on SIGUSR2. A
rank that stops as asked exits 0 here: Open MPI kills the others at the first other code, also those still writing.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Literal, TextIO

from launch import local
from launch.local import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_USER_MISTAKE, SIGNAL_HINTS
from launch.reasons import MARKED, VARIABLE, Reason, marked_reason
from launch.watch import Watch
from megatron_joy.errors import UserError, WorkError
from megatron_joy.platform.rendezvous import LOOPBACK, first_host, free_port, given_port, look_up
from megatron_joy.recipe import Recipe

Dialect = Literal["hydra", "openmpi", "srun"]
GRACE_SECONDS = 20.0  # between the first failed rank and ending the others, or a forced end and SIGKILL
# How a starter is asked to let the ranks stop, and what makes it end them at once.
STOP = {"hydra": signal.SIGTERM, "openmpi": signal.SIGUSR2, "srun": signal.SIGUSR2}
FORCE = {"hydra": [signal.SIGINT, signal.SIGINT], "openmpi": [signal.SIGTERM], "srun": [signal.SIGTERM]}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAST_LINES = 20

# What mpiexec says of a rank that left: (pattern, what its number is).
DEATHS: tuple[tuple[str, Literal["rank", "signal", "code"]], ...] = (
    (r"THE EXIT STRING: .*\(signal (\d+)\)", "signal"),  # Hydra, which doesn't say whose
    (r"process rank (\d+) with PID", "rank"),  # Open MPI
    (r"^signal (\d+) \(", "signal"),
    (r"Process name: \[.*,(\d+)\]", "rank"),
    (r"Exit code:\s+(\d+)", "code"),
    (r"srun: error: .*: task (\d+): ", "rank"),  # Slurm
    (r"srun: error: .*: Exited with exit code (\d+)", "code"),
)
BANNER = re.compile(
    r"^(=|YOUR APPLICATION TERMINATED|This typically refers to|Please see the FAQ|\[(mpiexec|proxy).*@|srun: |-{20,}$"
    r"|prterun (noticed|detected) that |signal \d+ \(|thus causing the job|   Process name: \[|   Exit code: )"
)


@dataclass(frozen=True)
class Mpi:
    """How to start: nodes, a file of hosts (none: this machine, or the job's allocation), the plugin for srun."""

    nodes: int = 1
    hosts: Path | None = None
    srun: str | None = None


def dialect_of(command: str) -> Dialect:
    """Whose mpiexec this is, by what it says of itself; UserError for another."""
    asked = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60, check=False)
    told = asked.stdout + asked.stderr
    if re.search(r"HYDRA|Intel\(R\) MPI", told):
        return "hydra"
    if re.search(r"Open ?MPI|OpenRTE|prte", told):
        return "openmpi"
    first = told.strip().partition("\n")[0]
    raise UserError(f"{command}: says {first!r} of itself; MPICH, Intel MPI and Open MPI are known")


def find_starter(mpi: Mpi) -> tuple[str, Dialect]:
    """The command that starts ranks; UserError where there is none."""
    names = ["srun"] if mpi.srun else ["mpiexec", "mpirun"]
    # A wheel's mpiexec lies beside the interpreter, which need not be in PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
    if found is None:
        fix = "run inside Slurm, or leave --srun out" if mpi.srun else "pip install -e '.[mpi]', or load a module"
        raise UserError(f"joy launch mpi: no {' or '.join(names)} in PATH; {fix}")
    return found, "srun" if mpi.srun else dialect_of(found)


def meeting_place(mpi: Mpi, environment: Mapping[str, str]) -> str:
    """Address of rank 0's node: MASTER_ADDR if it is set, else the first host of the file or of the allocation."""
    if given := environment.get("MASTER_ADDR"):
        return given
    if mpi.hosts is not None:
        return look_up(_first_line(mpi.hosts))
    if mpi.nodes == 1:
        return LOOPBACK
    if nodes := environment.get("SLURM_JOB_NODELIST"):
        return look_up(first_host(nodes))
    raise UserError(f"--nodes {mpi.nodes}: no hosts are known; give --hosts FILE, or start it in a Slurm allocation")


def _first_line(hosts: Path) -> str:
    try:
        lines = hosts.read_text().splitlines()
    except OSError as error:
        raise UserError(f"--hosts {hosts}: {error.strerror}; expected a file with a host's name a line") from None
    names = [line.split("#")[0].split() for line in lines]
    name = next((words[0].partition(":")[0] for words in names if words), None)
    if name is None:
        raise UserError(f"--hosts {hosts}: names no host; expected one a line")
    return name


def command(
    recipe: Recipe, ranks: Sequence[str], starter: str, dialect: Dialect, mpi: Mpi, place: tuple[str, int]
) -> list[str]:
    """The command that starts a recipe's world; `ranks` is each rank's own, `place` rank 0's address and port."""
    size = recipe.layout.world_size
    if size % mpi.nodes:
        near = max(number for number in range(1, mpi.nodes) if size % number == 0)
        raise UserError(f"--nodes {mpi.nodes}: {size} ranks don't spread evenly over them; the nearest is {near}")
    each = size // mpi.nodes
    threads = recipe.train.threads or max(1, (os.cpu_count() or 1) // each)
    variables = {
        "MASTER_ADDR": place[0],
        "MASTER_PORT": str(place[1]),
        "OMP_NUM_THREADS": str(threads),
        VARIABLE: MARKED,
    }
    hosts = [] if mpi.hosts is None else ["-f" if dialect == "hydra" else "--hostfile", str(mpi.hosts)]
    if dialect == "hydra":
        given = [word for name, value in variables.items() for word in ("-genv", name, value)]
        return [starter, "-n", str(size), "-ppn", str(each), *hosts, *given, *ranks]
    if dialect == "openmpi":
        given = [word for name, value in variables.items() for word in ("-x", f"{name}={value}")]
        spread = ["--map-by", f"ppr:{each}:node:OVERSUBSCRIBE", "--bind-to", "none"]
        return [starter, "-n", str(size), *spread, *hosts, *given, *ranks]
    spread = [f"--ntasks={size}", f"--nodes={mpi.nodes}", f"--ntasks-per-node={each}", "--kill-on-bad-exit=1"]
    given = ["--export=" + ",".join(["ALL", *(f"{name}={value}" for name, value in variables.items())])]
    return [starter, f"--mpi={mpi.srun}", *spread, *given, *ranks]


@dataclass
class Ended:
    """What was heard of the ranks: their reasons in order, what mpiexec said of one that left, the last lines."""

    reasons: list[Reason] = field(default_factory=list)
    deaths: dict[str, int] = field(default_factory=dict)
    last: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    sent: set[int] = field(default_factory=set)  # signals of ours that the ranks may have died of

    def hear(self, line: str) -> bool:
        """Notes a line of stderr; whether it is for the terminal too."""
        if (reason := marked_reason(line)) is not None:
            self.reasons.append(reason)
            return False
        for pattern, what in DEATHS:
            if found := re.search(pattern, line):
                self.deaths.setdefault(what, int(found[1]))
        if BANNER.match(line):
            return False
        if line.strip():
            self.last.append(line.strip())
        return True

    def failure(self) -> Reason | None:
        """A rank that a signal killed is the cause of what others say; else the first that isn't a stop as asked."""
        rank, number, code = (self.deaths.get(what) for what in ("rank", "signal", "code"))
        if number is None and code is not None and code > 128:  # srun's way to say a signal
            number = code - 128
        if number in set(signal.Signals) and number not in self.sent:
            known = signal.Signals(number)
            who = "a rank" if rank is None else f"rank {rank}"
            return Reason(rank or 0, EXIT_FAILED, f"{who} was killed by {known.name}{SIGNAL_HINTS.get(known, '')}")
        return next((reason for reason in self.reasons if reason.exit_code != EXIT_STOPPED), None)

    def left(self, code: int) -> str:
        """A failure that no rank explained."""
        who = f"rank {self.deaths['rank']}" if "rank" in self.deaths else "a rank"
        words = f": {self.last[-1]}" if self.last else ""
        return f"{who} left with exit code {self.deaths.get('code', code)}{words}"


def _in_child() -> None:
    """Before exec: mpiexec, and with it the ranks, ends with its launcher. A session: Ctrl-C is not for it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.setsid()


@dataclass
class Starter:
    """The running mpiexec or srun."""

    process: subprocess.Popen[bytes]
    dialect: Dialect
    ended: Ended = field(default_factory=Ended)
    asked_to_stop: bool = False
    cut_short: bool = False
    dying: bool = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM and Ctrl-C ask every rank to checkpoint and leave; a second one ends them."""
        if self.asked_to_stop:
            self.cut_short = True
            self.end()
            return
        self.asked_to_stop = True
        self.ended.sent.add(STOP[self.dialect])
        self.process.send_signal(STOP[self.dialect])
        os.write(2, b"stopping: the ranks finish their step and checkpoint; a second signal kills them\n")

    def end(self) -> None:
        """Has the ranks killed."""
        self.ended.sent |= {signal.SIGKILL, signal.SIGTERM, signal.SIGINT}
        for number in FORCE[self.dialect]:
            self.process.send_signal(number)
            time.sleep(0.2)  # two signals that are pending are one
        _later(self.process.kill)

    def relay(self, stream: IO[bytes], out: TextIO) -> None:
        """Until the stream ends: shows what is for the terminal; the first failure begins the time of grace."""
        for line in stream:
            if self.ended.hear(line.decode(errors="replace").rstrip("\n")):
                out.write(line.decode(errors="replace"))
                out.flush()
            elif not self.dying and any(reason.exit_code != EXIT_STOPPED for reason in self.ended.reasons):
                self.dying = True
                _later(self.end)


def _later(action: Callable[[], object]) -> None:
    timer = threading.Timer(GRACE_SECONDS, action)
    timer.daemon = True
    timer.start()


def run(words: Sequence[str], dialect: Dialect, watch: Watch) -> tuple[int, Starter, str]:
    """Runs the starter to its end: its exit code, what was heard, and the line about a hang if it was ended for one.

    Stacks are those of the ranks on this node.
    """
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_in_child
    )
    starter = Starter(process, dialect)
    ends = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))  # Hydra speaks of deaths on stdout
    readers = [threading.Thread(target=starter.relay, args=end, daemon=True) for end in ends]
    for reader in readers:
        reader.start()
    before = {number: signal.signal(number, starter.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        hang = local.wait_or_end(lambda: process.poll() is None, lambda: starter.dying, starter.end, watch)
        code = process.wait()
        for reader in readers:
            reader.join(GRACE_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, starter, hang


def prepared(recipe: Recipe, ranks: Sequence[str], mpi: Mpi) -> tuple[list[str], Dialect]:
    """The command that starts the world; its port is MASTER_PORT if that is set, else a free one of this machine."""
    starter, dialect = find_starter(mpi)
    place = meeting_place(mpi, os.environ), given_port(os.environ) or free_port()
    return command(recipe, ranks, starter, dialect, mpi, place), dialect


def run_mpi(recipe: Recipe, ranks: Sequence[str], mpi: Mpi) -> int:
    """Runs a recipe's world under MPI to its end. Returns 0 when all steps are done, 75 when stopped as asked.

    Raises UserError for a mistake that the ranks found and WorkError when one failed: what the first one said.
    """
    local.check(recipe)
    words, dialect = prepared(recipe, ranks, mpi)
    print(f"{recipe.run.folder}: starting {recipe.layout.world_size} ranks with {words[0]}", file=sys.stderr)
    code, starter, hang = run(words, dialect, local.unsupervised(recipe))
    if hang:
        raise local.hung(hang)
    if starter.cut_short:
        raise WorkError("killed before the ranks could checkpoint; the same command goes on from the last checkpoint")
    failure = starter.ended.failure()
    if failure is not None and failure.exit_code == EXIT_USER_MISTAKE:
        raise UserError(failure.message)
    if failure is not None:
        raise WorkError(failure.message)
    if starter.ended.reasons or (code and starter.asked_to_stop):
        return EXIT_STOPPED
    if code:
        raise WorkError(starter.ended.left(code))
    return EXIT_FINISHED
