"""A real Slurm on this machine for tests: munged, slurmctld and several slurmd on loopback, nothing under /etc.

No systemd, no cgroups, no database; two clusters side by side do not meet. A test asks for the fixture `slurm`. Under
CI=true a Slurm that is missing or does not start is a failure; elsewhere the test is skipped with the reason.
"""

import getpass
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from megatron_joy.platform.rendezvous import free_port

ROOT = Path(__file__).parents[1]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODES, CPUS = 3, 4
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

CONFIGURATION = """
ClusterName=joytest
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
# cred_expire is also how long a requeued job waits; its default is 120 s, and what is below 5 is not taken.
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/state/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=8
KillWait=60
InactiveLimit=0
MinJobAge=3600
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=closed Nodes=ALL AllocNodes=n1 MaxTime=INFINITE State=UP
"""


def wait_until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    """Raises AssertionError when something doesn't hold in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)


@dataclass
class Cluster:
    """Virtual nodes n1 .. n3 of four CPUs and two pretended GPUs each, in partition `main`."""

    root: Path
    daemons: dict[str, psutil.Process] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """For whatever talks to this cluster; jobs inherit it from sbatch."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return kept | {
            "PATH": PATH,
            "SLURM_CONF": str(self.root / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "JOY_PYTHON": sys.executable,
        }

    def run(self, *command: str, check: bool = True, cwd: Path = ROOT) -> str:
        """A command's standard output."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=120, check=False, cwd=cwd
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def sbatch(self, *arguments: str, cwd: Path = ROOT) -> str:
        """Submits; the job's id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd)

    def state(self, job: str) -> str:
        """A job's state; of an array, the states of its tasks that are left, joined."""
        shown = self.run("squeue", "--states=all", "--noheader", "--array", "--format=%T", f"--jobs={job}", check=False)
        return ",".join(sorted(set(shown.split())))

    def wait_for(self, job: str, *states: str, seconds: float = 120.0) -> None:
        """Until a job is in one of these states; raises AssertionError when it isn't in time or ends in another."""
        end = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert state not in ENDED, f"job {job} is {state}, expected {states}"
            assert time.monotonic() < end, f"job {job} is {state}, expected {states} in {seconds:.0f} s"
            time.sleep(0.1)

    def kill_node(self, node: str) -> None:
        """As a node that loses power: its slurmd, the job steps there and their processes, at once."""
        victims = [self.daemons.pop(node)]
        for process in psutil.process_iter(["name"]):
            with suppress(psutil.Error):
                if process.info["name"] == "slurmstepd" and self._is_on(process, node):
                    victims += [process, *process.children(recursive=True)]
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)

    def _is_on(self, stepd: psutil.Process, node: str) -> bool:
        """Whether a job step's daemon is this cluster's node's: it keeps the node's log open."""
        return any(file.path == str(self.root / "log" / f"{node}.log") for file in stepd.open_files())

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd, and waits until Slurm gives it work."""
        (self.root / "state" / node).mkdir(parents=True, exist_ok=True)
        (self.root / "run" / f"{node}.pid").unlink(missing_ok=True)  # of the slurmd that was killed
        self.run("slurmd", "-N", node)
        self.daemons[node] = self._daemon(node)
        shown = ("sinfo", "-hN", "-n", node, "-p", "main", "-o", "%t")
        wait_until(lambda: self.run(*shown).rstrip("*") == "idle", 30, f"node {node}")

    def _daemon(self, name: str) -> psutil.Process:
        file = self.root / "run" / f"{name}.pid"
        wait_until(lambda: file.exists() and file.read_text().strip().isdigit(), 20, f"{name} started")
        return psutil.Process(int(file.read_text()))

    def start(self) -> None:
        """Everything, to idle nodes."""
        for folder in ("log", "run", "state", "munge"):
            (self.root / folder).mkdir()
        ports = [free_port() for _ in range(NODES + 1)]
        nodes = "\n".join(
            f"NodeName=n{i} NodeHostname=localhost NodeAddr=127.0.0.{10 + i} Port={ports[i]} CPUs={CPUS} "
            "RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
            for i in range(1, NODES + 1)
        )
        text = CONFIGURATION.format(root=self.root, port=ports[0], user=getpass.getuser(), nodes=nodes)
        (self.root / "slurm.conf").write_text(text)
        # Slurm wants a device behind each GPU; any does.
        (self.root / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        key = self.root / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        folder, run = self.root / "munge", self.root / "run"
        options = (f"--key-file={key}", f"--socket={run / 'munge.sock'}", f"--pid-file={run / 'munged.pid'}")
        self.run("munged", "--force", *options, f"--log-file={folder / 'log'}", f"--seed-file={folder / 'seed'}")
        self.daemons["munged"] = self._daemon("munged")
        self.run("slurmctld", "-i")
        self.daemons["slurmctld"] = self._daemon("slurmctld")
        wait_until(lambda: "UP" in self.run("scontrol", "ping", check=False), 20, "slurmctld answers")
        for i in range(1, NODES + 1):
            self.start_node(f"n{i}")

    def stop(self) -> None:
        """Jobs and daemons; only what this cluster started."""
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.run("scancel", f"--user={getpass.getuser()}", check=False)
            idle = "squeue", "--noheader"
            wait_until(lambda: not self.run(*idle, check=False), 5, "no job left")
        for node in [name for name in self.daemons if name.startswith("n")]:
            self.kill_node(node)
        for process in self.daemons.values():
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(list(self.daemons.values()), timeout=10)


def _refuse(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def slurm_session() -> Iterator[Cluster]:
    """The cluster of this test session."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        _refuse(f"no Slurm here ({', '.join(missing)}): apt install munge slurmctld slurmd slurm-client")
    root = Path(tempfile.mkdtemp(prefix="joy-slurm-"))  # a socket's path must be short
    root.chmod(0o755)
    cluster = Cluster(root)
    try:
        cluster.start()
    except (AssertionError, OSError, psutil.Error) as error:
        cluster.stop()
        _refuse(f"Slurm does not start: {error}; its logs are in {root / 'log'}")
    yield cluster
    cluster.stop()
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def slurm(slurm_session: Cluster) -> Iterator[Cluster]:
    """The cluster with all its nodes up and no job of another test."""
    for node in (f"n{i}" for i in range(1, NODES + 1)):
        if node not in slurm_session.daemons:
            slurm_session.start_node(node)
    yield slurm_session
    slurm_session.run("scancel", f"--user={getpass.getuser()}", check=False)
