"""Ranks of a run inside a Slurm job: one srun task for each, looked after from the batch host. Standard library only.

What Slurm is asked is asked with its commands; their output is taken with its documented formats.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from launch.policy import EXIT_STOPPED, Ended
from launch.reasons import FOLDER_VARIABLE, Reason, reasons_in
from launch.stacks import Stack
from megatron_joy.errors import UserError, WorkError
from megatron_joy.platform.rendezvous import FIRST_PORT, PORTS, is_free
from megatron_joy.runstate import FENCE_VARIABLE, launch_folder

COMMAND_SECONDS = 60
PROBE_SECONDS = 60
PROBES = 16  # at a time
EXCLUDE_SECONDS = 15.0  # Slurm gives a job that is requeued no less to end (KillWait: 30 s if a site leaves it alone)
GRACE_SECONDS = 20.0  # between the first failed rank and killing the others
# What srun says when a task ends badly: node, tasks, how.
TASK_ENDED = re.compile(r"^srun: error: (?P<node>[\w.-]+): tasks? (?P<tasks>[\d,-]+): (?P<how>.+)$")
NODE_FAILED = re.compile(r"^srun: error: (?:Node failure on|Nodes) (?P<node>[\w.-]+)")
IN_ORDER = f"Exited with exit code {EXIT_STOPPED}"


def ask(*command: str, check: bool = True, seconds: float = COMMAND_SECONDS) -> str:
    """A Slurm command's output; WorkError with what it said when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; run this where Slurm's commands are") from None
    except subprocess.TimeoutExpired:
        raise WorkError(f"{command[0]} gave no answer in {seconds:.0f} s") from None
    if check and done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise WorkError(f"{command[0]} {command[1] if len(command) > 1 else ''}: {said[-1] if said else 'failed'}")
    return done.stdout.strip()


def address_of(node: str) -> str:
    """Where other nodes reach a node: what its name resolves to, else what Slurm itself uses.

    Raises WorkError rather than guess: with an address of its own each node would form a world of one.
    """
    try:
        return str(socket.getaddrinfo(node, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        shown = ask("scontrol", "show", "node", node, "--oneliner")
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    if found is None:
        raise WorkError(f"node {node}: its name does not resolve and Slurm has no NodeAddr for it")
    return found[1]


def port_for(job: int, fence: int, address: str) -> int:
    """A port that other jobs and attempts hardly share and that is free, where that can be seen from here."""
    for attempt in range(20):
        port = FIRST_PORT + (job * 37 + fence + attempt * 1009) % PORTS
        if is_free(address, port):
            return port
    raise WorkError(f"no port of {FIRST_PORT} to {FIRST_PORT + PORTS} is free on {address}")


@dataclass(frozen=True)
class Job:
    """The allocation that this process is in."""

    id: str  # of an array's task: JOB_TASK, by which alone it may be requeued
    number: int
    nodes: tuple[str, ...]
    tasks_per_node: int

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> "Job":
        """Raises UserError outside a job."""
        try:
            number, listed = environment["SLURM_JOB_ID"], environment["SLURM_JOB_NODELIST"]
        except KeyError as missing:
            raise UserError(f"environment: {missing} is not set; start this with sbatch") from None
        nodes = tuple(ask("scontrol", "show", "hostnames", listed).split())
        each = environment.get("SLURM_NTASKS_PER_NODE") or str(int(environment.get("SLURM_NTASKS", "1")) // len(nodes))
        array = environment.get("SLURM_ARRAY_JOB_ID")
        name = f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else number
        return Job(name, int(number), nodes, int(each))


@dataclass
class SlurmRanks:
    """One srun step and what is known of it."""

    job: Job
    run: Path
    fence: int
    nodes: Sequence[str]
    process: subprocess.Popen[str]
    reasons: Path
    _asked: bool = False
    _first: Reason | None = None
    _node: str = ""
    _deadline: float | None = None
    _killed: float | None = None

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Passes on what srun and the ranks print, and notes the first task that ended badly."""
        assert self.process.stderr is not None, "opened with a pipe"
        for line in self.process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            found = TASK_ENDED.match(line) or NODE_FAILED.match(line)
            if found is None or self._first is not None or IN_ORDER in line or (self._asked and "Terminated" in line):
                continue
            parts = found.groupdict()
            task = re.match(r"\d+", parts.get("tasks", ""))
            self._node = parts["node"]
            rank = int(task[0]) if task else -1
            how = f"rank {rank} on {self._node}: {parts['how'].strip()}" if task else f"node {self._node} failed"
            self._first = Reason(rank, 1, how)

    def running(self) -> bool:
        """Kills the others when one has failed and they have had their time."""
        left = self.process.poll() is None
        if self._deadline is None and (self._first is not None or any(self.reasons.glob("rank_*.json"))):
            self._deadline = time.monotonic() + GRACE_SECONDS
        if left and self._deadline is not None and time.monotonic() > self._deadline:
            self.kill()
        return left

    def _signal(self, name: str) -> None:
        for step in self._steps():
            ask("scancel", f"--signal={name}", step, check=False)

    def _steps(self) -> list[str]:
        shown = ask("squeue", "--steps", f"--jobs={self.job.id}", "--noheader", "--format=%i %j", check=False)
        rows = (line.split(maxsplit=1) for line in shown.splitlines())
        return [row[0] for row in rows if len(row) == 2 and row[1] == step_name(self.fence)]

    def ask_to_stop(self) -> None:
        """SIGTERM to every rank, which srun itself would take as the order to kill them."""
        self._asked = True  # one that does not listen yet is ended by it
        self._signal("TERM")

    def kill(self) -> None:
        """SIGKILL to every rank; srun itself goes when that leads to nothing, as on a dead node."""
        now = time.monotonic()
        if self._killed is None:
            self._killed = now
            self._signal("KILL")
        elif now - self._killed > GRACE_SECONDS:
            self.process.kill()

    def stacks(self) -> list[Stack]:
        """From a helper on each node; of nodes that don't answer, none."""
        command = [
            "srun",
            "--overlap",
            f"--jobid={self.job.id}",
            f"--nodes={len(self.nodes)}",
            f"--ntasks={len(self.nodes)}",
            "--ntasks-per-node=1",
            f"--nodelist={','.join(self.nodes)}",
            *(sys.executable, "-m", "launch.stacks", str(self.run), str(self.fence)),
        ]
        try:
            printed = ask(*command, check=False, seconds=PROBE_SECONDS)
        except WorkError:
            return []
        rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        return [Stack(**row | {"frames": tuple(row["frames"])}) for row in rows]

    def ended(self) -> Ended:
        """What the first failing rank said, else what srun said of it; nodes that answer no more are to blame."""
        self._reader.join(timeout=10)
        told = reasons_in(self.reasons)
        code = self.process.returncode
        suspects = self._suspects()
        with ThreadPoolExecutor(PROBES) as pool:
            there = list(pool.map(lambda node: answers(self.job, node), suspects))
        lost = tuple(node for node, one in zip(suspects, there, strict=True) if not one)
        if lost:
            return Ended(code, 1, f"no answer any more from {', '.join(lost)}", lost)
        if told:
            return Ended(code, told[0].exit_code, told[0].message)
        if self._first is not None and self._killed is None:
            return Ended(code, 1, self._first.message)
        return Ended(code)

    def _suspects(self) -> list[str]:
        """Nodes to look at after an end that nobody has explained. A job that ends starts nothing anywhere."""
        told = reasons_in(self.reasons)
        in_order = self._asked or self.process.returncode in (0, EXIT_STOPPED)
        if in_order or any(reason.exit_code != 1 for reason in told) or not is_running(self.job):
            return []
        return list(self.nodes)


def step_name(fence: int) -> str:
    """By which an attempt's step is found among a job's."""
    return f"joy-{fence}"


def is_running(job: Job) -> bool:
    """Whether Slurm sees the job running: one that ends was cancelled, or Slurm requeues it itself."""
    return " JobState=RUNNING " in f" {ask('scontrol', 'show', 'job', job.id, '--oneliner', check=False)} "


def is_down(node: str) -> bool:
    """Whether Slurm has set a node down, whatever else it says of it (as DOWN+COMPLETING+NOT_RESPONDING)."""
    shown = re.search(r"\bState=(\S+)", ask("scontrol", "show", "node", node, "--oneliner", check=False))
    return shown is not None and "DOWN" in re.split(r"[+*]", shown[1])


def answers(job: Job, node: str) -> bool:
    """Whether a node of the allocation still starts a process."""
    place = (f"--jobid={job.id}", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}")
    command = ["srun", *place, "--quiet", "true"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


@dataclass
class SlurmPlace:
    """The nodes of a job. spares: nodes that are allocated and idle until another fails."""

    run: Path
    job: Job
    command: Sequence[str]  # of every rank
    spares: int = 0
    step_options: Sequence[str] = ()  # of srun, as a container's
    launch: str = ""
    _left_out: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.launch = f"Slurm job {self.job.id}"

    @property
    def _wanted(self) -> int:
        return len(self.job.nodes) - self.spares

    def _healthy(self) -> list[str]:
        return [node for node in self.job.nodes if node not in self._left_out]

    def _step(self, name: str, nodes: Sequence[str], command: Sequence[str]) -> list[str]:
        """srun with one task for each rank."""
        return [
            "srun",
            f"--job-name={name}",
            f"--nodes={len(nodes)}",
            f"--ntasks={len(nodes) * self.job.tasks_per_node}",
            f"--ntasks-per-node={self.job.tasks_per_node}",
            f"--nodelist={','.join(nodes)}",
            "--distribution=block",
            "--export=ALL",
            "--kill-on-bad-exit=0",  # a rank that fails must not kill one that saves
            "--wait=0",
            # A step that lost a node may keep its cores on the others for good: Slurm waits for the dead node's word.
            *(["--overlap"] if self._left_out else []),
            *self.step_options,
            *command,
        ]

    def _meeting(self, nodes: Sequence[str], fence: int) -> dict[str, str]:
        """Where the ranks of an attempt meet."""
        address = address_of(nodes[0])
        return {"MASTER_ADDR": address, "MASTER_PORT": str(port_for(self.job.number, fence, address))}

    def measure(self) -> int:
        """Runs the command's preflight on the nodes that the next attempt would have; its exit code."""
        nodes = self._healthy()[: self._wanted]
        command = ["preflight" if word == "pretrain" else word for word in self.command]
        step = self._step("joy-preflight", nodes, command)
        environment = os.environ | self._meeting(nodes, fence=0)
        return subprocess.run(step, env=environment, stdin=subprocess.DEVNULL, check=False).returncode

    def start(self, fence: int) -> SlurmRanks:
        """One srun task for each rank."""
        nodes = self._healthy()[: self._wanted]
        reasons = launch_folder(self.run) / "reasons" / f"{fence:06d}"
        reasons.mkdir(parents=True, exist_ok=True)
        own = {FENCE_VARIABLE: str(fence), FOLDER_VARIABLE: str(reasons.resolve())} | self._meeting(nodes, fence)
        command = self._step(step_name(fence), nodes, self.command)
        # A session of its own: Ctrl-C and what is sent to the job's group is for the supervisor to pass on.
        process = subprocess.Popen(
            command,
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        return SlurmRanks(self.job, self.run, fence, nodes, process, reasons)

    def leave_out(self, nodes: Sequence[str]) -> None:
        """Not in this allocation and, after a requeue, not in the next."""
        self._left_out.update(nodes)

    def move_on(self, failed: bool) -> bool:
        """Requeues the job: after a stop, or when too few nodes are left. Not a job that is being cancelled."""
        if failed and len(self._healthy()) >= self._wanted:
            return False
        if not is_running(self.job):
            if failed:
                raise WorkError(f"job {self.job.id} has too few nodes left and may not be requeued; start it again")
            return False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCONT):
            signal.signal(number, signal.SIG_IGN)  # the requeue ends this script; it has something left to do
        ask("scontrol", "requeue", self.job.id)
        if self._left_out:
            self._exclude()
        return True

    def _exclude(self) -> None:
        """Only a job that is queued takes it: a moment after the requeue. Those left out before stay out.

        Not where Slurm has set a node down: it gives no work there, and from a job that such a node was taken from it
        takes no change before the requeue is through, which in turn waits for this script to end (a minute, as tried).
        """
        out = [node for node in sorted(self._left_out) if not is_down(node)]
        if not out:
            return
        shown = ask("scontrol", "show", "job", self.job.id, "--oneliner", check=False)
        before = re.search(r" ExcNodeList=(\S+)", shown)
        known = [before[1]] if before and before[1] != "(null)" else []
        nodes = ",".join([*known, *out])
        end, reason = time.monotonic() + EXCLUDE_SECONDS, ""
        while time.monotonic() < end:
            try:
                ask("scontrol", "update", f"JobId={self.job.id}", f"ExcNodeList={nodes}")
                return
            except WorkError as error:
                reason = str(error)
                time.sleep(0.2)
        print(f"note: {nodes} could not be excluded: {reason}", file=sys.stderr, flush=True)
