"""A process finds its rank in whichever launcher's environment it was started."""

import pytest

from megatron_joy.errors import UserError
from megatron_joy.platform.rank import LAUNCHERS, RankInfo, rank_info, tasks_per_node

# What processes found, names and values as they were, of what is read or could mislead: torchrun of torch 2.15, mpiexec
# of Open MPI 5.0.11 and MPICH 5.0.2, srun and its batch script of Slurm 22.05.8 (job of two nodes).
SLURM_JOB = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
RECORDED: dict[str, tuple[dict[str, str], RankInfo]] = {
    "torchrun": (
        {
            "RANK": "5",
            "WORLD_SIZE": "8",
            "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "4",
            "GROUP_RANK": "1",
            "GROUP_WORLD_SIZE": "2",
            "TORCHELASTIC_RUN_ID": "none",
        },
        RankInfo(5, 8, 1, 4, "torchrun"),
    ),
    "openmpi": (
        {
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            "OMPI_COMM_WORLD_NODE_RANK": "1",
            "OMPI_UNIVERSE_SIZE": "2",
            "PMIX_NAMESPACE": "prterun-vm-25608@1",
            "PMIX_RANK": "1",
        },
        RankInfo(1, 2, 1, 2, "openmpi"),
    ),
    "mpich": (
        {"MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1", "PMI_FD": "11", "PMI_RANK": "1", "PMI_SIZE": "2"},
        RankInfo(1, 2, 1, 2, "mpich"),
    ),
    "slurm": (
        SLURM_JOB
        | {
            "SLURM_PROCID": "2",
            "SLURM_NTASKS": "3",
            "SLURM_NPROCS": "3",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "1",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NODELIST": "n[1-2]",
            "SLURM_STEP_TASKS_PER_NODE": "2,1",
        },
        RankInfo(2, 3, 0, 1, "slurm"),
    ),
    "slurm, srun --mpi=pmi2": (
        SLURM_JOB
        | {
            "PMI_FD": "15",
            "PMI_JOBID": "1.1",
            "PMI_RANK": "2",
            "PMI_SIZE": "4",
            "SLURM_PROCID": "2",
            "SLURM_NTASKS": "4",
            "SLURM_LOCALID": "2",
            "SLURM_NODEID": "0",
            "SLURM_STEP_ID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "3,1",
        },
        RankInfo(2, 4, 2, 3, "slurm"),
    ),
    "mpiexec of MPICH in a Slurm job": (
        SLURM_JOB
        | {
            "MPI_LOCALNRANKS": "3",
            "MPI_LOCALRANKID": "2",
            "PMI_RANK": "2",
            "PMI_SIZE": "4",
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "2",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
            "SLURM_STEP_ID": "2",
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        },
        RankInfo(2, 4, 2, 3, "mpich"),
    ),
    "a Slurm batch script": (
        SLURM_JOB | {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "3,1"},
        RankInfo(0, 1, 0, 1, "none"),
    ),
    "nobody": ({}, RankInfo(0, 1, 0, 1, "none")),
}


@pytest.mark.parametrize("case", RECORDED)
def test_the_rank_is_read_from_each_recorded_environment(case: str) -> None:
    environment, place = RECORDED[case]
    assert rank_info(environment) == place


def test_torchrun_that_srun_started_on_each_node_wins() -> None:
    env = RECORDED["slurm"][0] | RECORDED["torchrun"][0]
    assert rank_info(env) == RankInfo(5, 8, 1, 4, "torchrun")


def test_a_shell_that_salloc_made_a_step_of_is_a_world_of_one() -> None:
    assert rank_info(RECORDED["slurm"][0] | {"SLURM_STEP_ID": "4294967290"}).world_size == 1


EXPORTED = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ("slurm", "RANK = 0 of WORLD_SIZE = 4, but SLURM_PROCID = 2 of SLURM_NTASKS = 3"),
        ("mpich", "RANK = 0 of WORLD_SIZE = 4, but PMI_RANK = 1 of PMI_SIZE = 2"),
        ("openmpi", "RANK = 0 of WORLD_SIZE = 4, but OMPI_COMM_WORLD_RANK = 1 of OMPI_COMM_WORLD_SIZE = 2"),
    ],
)
def test_a_rank_exported_before_the_launcher_is_refused(launcher: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        rank_info(RECORDED[launcher][0] | EXPORTED)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_world_inside_one_task_contradicts_nothing() -> None:
    one = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_ID": "0"}
    env = one | {"SLURM_STEP_TASKS_PER_NODE": "1"} | EXPORTED | {"RANK": "3", "LOCAL_RANK": "3"}
    assert rank_info(env) == RankInfo(3, 4, 3, 4, "torchrun")


def test_pmi_and_slurm_that_disagree_are_refused() -> None:
    with pytest.raises(UserError, match="PMI_RANK = 1 of PMI_SIZE = 4, but SLURM_PROCID = 2 of SLURM_NTASKS = 4"):
        rank_info(RECORDED["slurm, srun --mpi=pmi2"][0] | {"PMI_RANK": "1"})


@pytest.mark.parametrize(
    ("launcher", "place"), [(name, place) for name in LAUNCHERS for place in (1, 2, 3)], ids=lambda value: str(value)
)
def test_half_an_environment_is_refused(launcher: str, place: int) -> None:
    names = LAUNCHERS[launcher]
    env = {name: value for name, value in RECORDED[launcher][0].items() if name != names[place]}
    with pytest.raises(UserError, match=f"{names[0]} is set but {names[place]} is not"):
        rank_info(env)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": "8"}, "RANK = 8 with WORLD_SIZE = 8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK = 4 with LOCAL_WORLD_SIZE = 4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE = 9 with WORLD_SIZE = 8"),
        ({"WORLD_SIZE": "eight"}, "WORLD_SIZE = 'eight' is no number"),
        ({"RANK": "-1"}, "RANK = '-1' is no number"),
    ],
)
def test_a_place_outside_the_world_is_refused(change: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        rank_info(RECORDED["torchrun"][0] | change)


def test_slurms_short_form_of_tasks_is_read() -> None:
    assert tasks_per_node("2(x3),1,4(x2)") == [2, 2, 2, 1, 4, 4]
    with pytest.raises(UserError, match="expected counts as in"):
        tasks_per_node("2(x3")
