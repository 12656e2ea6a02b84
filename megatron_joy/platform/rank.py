"""Which rank this process is, read from whichever launcher's environment is there; without torch.

Launchers nest: torchrun or Hydra's proxies run as tasks of a Slurm step and pass its variables on. The innermost one
counts. Where two speak of the same processes they must agree: a rank by accident trains a wrong model.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_joy.errors import UserError


@dataclass(frozen=True)
class RankInfo:
    """This process among its world; `local_*` count the processes of one node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str


# launcher -> variables of (rank, world size, local rank, local world size), the innermost launcher first.
LAUNCHERS: dict[str, tuple[str, str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
# Steps that are a shell in an allocation, not tasks: their SLURM_NTASKS is the job's (slurm.h, SLURM_BATCH_SCRIPT,
# SLURM_INTERACTIVE_STEP, SLURM_EXTERN_CONT).
NO_TASKS = {"4294967291", "4294967290", "4294967292"}
FIX = "start ranks with `joy launch`, or set all variables of one launcher"


def rank_info(environment: Mapping[str, str] | None = None) -> RankInfo:
    """The rank, world size and local rank; a process that no launcher started is a world of one.

    Raises UserError for a launcher's variable that is missing or no number, for a rank outside its world, and where two
    launchers contradict each other.
    """
    env = os.environ if environment is None else environment
    found = [info for info in (_of_launcher(env, launcher) for launcher in LAUNCHERS) if info is not None]
    if not found:
        return RankInfo(0, 1, 0, 1, "none")
    # torchrun under srun, and mpiexec whose proxies srun started, have worlds of their own; RANK that somebody exported
    # before srun or mpiexec has not: all ranks would be the same one.
    if found[0].launcher == "torchrun" and "TORCHELASTIC_RUN_ID" not in env:
        for outer in found[1:2]:
            _agree(found[0], outer)
    return found[0]


def _of_launcher(env: Mapping[str, str], launcher: str) -> RankInfo | None:
    """What one launcher's variables say; None where it started nothing."""
    rank, world, local_rank, _ = LAUNCHERS[launcher]
    if rank not in env:
        return None
    if launcher == "slurm":
        return _of_slurm(env) if in_slurm_step(env) else None
    if launcher == "mpich" and local_rank not in env and in_slurm_step(env):
        # srun --mpi=pmi2: Slurm knows the node.
        info = _of_slurm(env)
        _agree(RankInfo(_number(env, rank), _number(env, world), info.local_rank, info.local_world_size, "mpich"), info)
        return None
    number, size, local_number, local_size = (_number(env, name, because=rank) for name in LAUNCHERS[launcher])
    return _checked(RankInfo(number, size, local_number, local_size, launcher), LAUNCHERS[launcher])


def in_slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process as a task."""
    step = environment.get("SLURM_STEP_ID")
    return step is not None and step not in NO_TASKS


def _of_slurm(env: Mapping[str, str]) -> RankInfo:
    names = LAUNCHERS["slurm"]
    rank, world, local_rank = (_number(env, name, because=names[0]) for name in names[:3])
    if names[3] not in env:
        raise _missing(names[3], because=names[0])
    node, counts = _number(env, "SLURM_NODEID", because=names[0]), tasks_per_node(env[names[3]])
    if node >= len(counts):
        raise UserError(f"environment: SLURM_NODEID = {node}, but {names[3]} = {env[names[3]]} has {len(counts)} nodes")
    return _checked(RankInfo(rank, world, local_rank, counts[node], "slurm"), names)


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form, "2(x3),1" -> [2, 2, 2, 1]; UserError for another."""
    counts: list[int] = []
    for part in text.split(","):
        form = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if form is None:
            raise UserError(f"environment: SLURM_STEP_TASKS_PER_NODE = {text}: expected counts as in 2(x3),1; {FIX}")
        counts += [int(form[1])] * int(form[2] or 1)
    return counts


def _missing(name: str, because: str) -> UserError:
    return UserError(f"environment: {because} is set but {name} is not; {FIX}")


def _number(env: Mapping[str, str], name: str, because: str = "") -> int:
    if name not in env:
        raise _missing(name, because)
    if not env[name].isdecimal():
        raise UserError(f"environment: {name} = {env[name]!r} is no number of 0 or more; {FIX}")
    return int(env[name])


def _checked(info: RankInfo, names: tuple[str, str, str, str]) -> RankInfo:
    for number, size, name, limit in (
        (info.rank, info.world_size, names[0], names[1]),
        (info.local_rank, info.local_world_size, names[2], names[3]),
        (info.local_world_size - 1, info.world_size, names[3], names[1]),
    ):
        if number >= size:
            found = f"{name} = {number + (name == names[3])} with {limit} = {size}"
            raise UserError(f"environment: {found} is no place in a world; {FIX}")
    return info


def _agree(inner: RankInfo, outer: RankInfo) -> None:
    """A world of one outside (a single task that starts a world of its own) contradicts nothing."""
    if outer.world_size == 1 or (inner.rank, inner.world_size) == (outer.rank, outer.world_size):
        return
    (rank, world, *_), (outer_rank, outer_world, *_) = LAUNCHERS[inner.launcher], LAUNCHERS[outer.launcher]
    raise UserError(
        f"environment: {rank} = {inner.rank} of {world} = {inner.world_size}, but {outer_rank} = {outer.rank} of "
        f"{outer_world} = {outer.world_size}; unset {rank} and {world} where {outer.launcher} starts the ranks"
    )
