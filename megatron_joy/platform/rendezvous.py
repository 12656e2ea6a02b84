"""Where the ranks of a world meet: address and port of rank 0's store, from the launcher's environment; no torch."""

import errno
import os
import random
import re
import shutil
import socket
import subprocess
import zlib
from collections.abc import Mapping

from megatron_joy.errors import UserError, WorkError
from megatron_joy.platform.rank import RankInfo

LOOPBACK = "127.0.0.1"
FIRST_PORT, PORTS = 12_000, 16_000  # below 32768, where Linux begins to give ports away by itself
PATIENCE = 15.0  # seconds for scontrol


def rendezvous(info: RankInfo, environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Address and port, the same on every rank.

    MASTER_ADDR and MASTER_PORT win. Else the address is loopback in a world on one node, and the first host of a Slurm
    step's node list, looked up: a host that can't be found is an error, since with a guess each node would form a world
    of its own. The port follows from the job's and the step's number, or from Open MPI's name of the job.

    Raises UserError where address or port follow from nothing.
    """
    env = os.environ if environment is None else environment
    return env.get("MASTER_ADDR") or _address(info, env), _port(info, env)


def _address(info: RankInfo, env: Mapping[str, str]) -> str:
    if info.local_world_size == info.world_size:
        return LOOPBACK
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if nodes:
        return look_up(first_host(nodes))
    raise UserError(
        f"environment: {info.launcher} started {info.world_size} ranks on several nodes and MASTER_ADDR is not set; "
        "use `joy launch mpi`, or pass MASTER_ADDR and MASTER_PORT of rank 0's node to all ranks"
    )


def given_port(environment: Mapping[str, str]) -> int | None:
    """MASTER_PORT; None where it isn't set, UserError where it is no port."""
    given = environment.get("MASTER_PORT")
    if given and (not given.isdecimal() or not 0 < int(given) < 65_536):
        raise UserError(f"environment: MASTER_PORT = {given!r} is no port; expected 1 to 65535, as 29500")
    return int(given) if given else None


def _port(info: RankInfo, env: Mapping[str, str]) -> int:
    if (given := given_port(env)) is not None:
        return given
    if "SLURM_JOB_ID" in env and "SLURM_STEP_ID" in env:
        name = f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}"
    elif "PMIX_NAMESPACE" in env:
        name = env["PMIX_NAMESPACE"]
    else:
        raise UserError(
            f"environment: {info.launcher} started {info.world_size} ranks and MASTER_PORT is not set; use "
            "`joy launch`, or pass a free port of rank 0's node to all ranks, as MASTER_PORT=29500"
        )
    return FIRST_PORT + zlib.crc32(name.encode()) % PORTS


def is_free(address: str, port: int) -> bool:
    """Whether nobody listens there; True where that can't be seen from here, as of another node's address."""
    with socket.socket() as probe:
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def free_port() -> int:
    """A port of loopback that is free and stays so until the world meets there.

    None that Linux picks (bind to port 0): between the look and the meeting, any connection of any process on the
    machine may be given the same. From below that range by chance, of the system and not of a seed that others share.
    """
    for port in random.SystemRandom().sample(range(FIRST_PORT, FIRST_PORT + PORTS), 100):
        if is_free(LOOPBACK, port):
            return port
    raise WorkError(f"{LOOPBACK}: none of 100 ports of {FIRST_PORT} to {FIRST_PORT + PORTS} is free")


def first_host(nodes: str) -> str:
    """The first name of Slurm's short form: "gpu[007-009,12],login" -> "gpu007"; UserError for another form."""
    name = re.match(r"([A-Za-z0-9._-]+)(?:\[(\d+)[^\]]*\])?([A-Za-z0-9._-]*)(?:,|$)", nodes)
    if name is None:
        raise UserError(f"environment: Slurm's node list {nodes!r} has no first host; set MASTER_ADDR")
    return name[1] + (name[2] or "") + name[3]


def look_up(host: str) -> str:
    """A host's address by the system's resolver, else as Slurm's controller knows the node; UserError for neither."""
    for name in (host, _node_address(host)):
        if name is None:
            continue
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except OSError:
            continue
        family = {kind: str(address[0]) for kind, *_, address in reversed(found)}
        return family.get(socket.AF_INET) or family[socket.AF_INET6]
    raise UserError(f"rank 0's host {host}: no address is known for it on {socket.gethostname()}; set MASTER_ADDR")


def _node_address(host: str) -> str | None:
    if shutil.which("scontrol") is None or host.startswith("-"):
        return None
    try:
        command = ["scontrol", "show", "node", "-o", host]
        told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\bNodeAddr=(\S+)", told)
    return found[1] if found else None
