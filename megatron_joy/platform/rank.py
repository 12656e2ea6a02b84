"""Which rank this process is, read from whichever launcher's environment is there; without torch."""

import os
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


# launcher -> variables of (rank, world size, local rank, local world size); the first whose rank is set wins.
LAUNCHERS: dict[str, tuple[str, str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}


def rank_info(environment: Mapping[str, str] | None = None) -> RankInfo:
    """The rank, world size and local rank; a process that no launcher started is a world of one.

    A launcher's rank without its world size is refused with UserError: a world of one by accident trains a wrong model.
    """
    env = os.environ if environment is None else environment
    for launcher, (rank, world, local_rank, local_world) in LAUNCHERS.items():
        if rank not in env or (launcher == "slurm" and "SLURM_STEP_ID" not in env):
            continue
        if world not in env:
            raise UserError(f"environment: {rank} is set but {world} is not; start ranks with `joy launch` or set both")
        size = int(env[world])
        return RankInfo(
            int(env[rank]), size, int(env.get(local_rank, env[rank])), int(env.get(local_world, size)), launcher
        )
    return RankInfo(0, 1, 0, 1, "none")
