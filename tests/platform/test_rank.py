"""A process finds its rank in whichever launcher's environment it was started."""

import pytest

from megatron_joy.errors import UserError
from megatron_joy.platform.rank import LAUNCHERS, RankInfo, rank_info

ENVIRONMENTS = {
    "torchrun": {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    "openmpi": {
        "OMPI_COMM_WORLD_RANK": "5",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    },
    "mpich": {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"},
    "slurm": {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_STEP_ID": "0",
    },
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_rank_is_read_from_each_launchers_environment(launcher: str) -> None:
    assert rank_info(ENVIRONMENTS[launcher]) == RankInfo(5, 8, 1, 4, launcher)


def test_torchrun_inside_a_slurm_step_wins() -> None:
    env = ENVIRONMENTS["slurm"] | ENVIRONMENTS["torchrun"] | {"RANK": "3"}
    assert rank_info(env).rank == 3
    assert rank_info(env).launcher == "torchrun"


def test_a_process_that_nobody_launched_is_a_world_of_one() -> None:
    assert rank_info({}) == RankInfo(0, 1, 0, 1, "none")


def test_a_shell_in_a_slurm_job_that_is_no_step_is_a_world_of_one() -> None:
    env = {name: value for name, value in ENVIRONMENTS["slurm"].items() if name != "SLURM_STEP_ID"}
    assert rank_info(env).world_size == 1


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_without_a_world_size_is_refused(launcher: str) -> None:
    rank, world, *_ = LAUNCHERS[launcher]
    env = {name: value for name, value in ENVIRONMENTS[launcher].items() if name != world}
    with pytest.raises(UserError, match=f"{rank} is set but {world} is not"):
        rank_info(env)
