"""Joining a world: the groups are those of the layout, and a world of another size is refused."""

import os
import socket
from typing import Any

import pytest
import torch.distributed as dist

from megatron_joy.errors import UserError
from megatron_joy.platform import process as platform
from megatron_joy.recipe.schema import LayoutSection
from tests.gloo import run_world

NAMES = ("tp", "pp", "cp", "ep", "expt_tp", "dp", "dp_cp", "expt_dp")


def test_a_world_of_another_size_is_refused_with_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"TP 2 x CP 1 x PP 1 x DP 3 needs 6 processes, 1 were started"):
        platform.start(LayoutSection(tensor_model_parallel_size=2, data_parallel_size=3), seed=1)
    assert not dist.is_initialized()


def test_looking_at_a_model_alone_leaves_no_world_behind() -> None:
    with platform.alone() as process:
        assert process.is_first_rank and process.is_last_pipeline_stage
        assert dist.get_world_size() == 1
        with platform.alone() as inner:
            assert inner.groups.tp.size() == 1
        assert dist.is_initialized()
    assert not dist.is_initialized()


def group_sizes(layout: dict[str, int]) -> dict[str, Any]:
    process = platform.start(LayoutSection(**layout), seed=1)
    sizes = {name: getattr(process.groups, name).size() for name in NAMES}
    told = sizes | {"rank": process.info.rank, "last stage": process.is_last_pipeline_stage}
    platform.stop()
    return told


def test_groups_have_the_sizes_of_the_layout() -> None:
    told = run_world(group_sizes, 4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})
    assert [rank["rank"] for rank in told] == [0, 1, 2, 3]
    assert [rank["last stage"] for rank in told] == [False, False, True, True]
    for rank in told:
        assert (rank["tp"], rank["pp"], rank["dp"], rank["ep"]) == (2, 2, 1, 1)
    layout = {"tensor_model_parallel_size": 2, "data_parallel_size": 2, "expert_model_parallel_size": 4}
    for rank in run_world(group_sizes, 4, layout):
        assert (rank["tp"], rank["dp"], rank["ep"], rank["expt_tp"], rank["expt_dp"]) == (2, 2, 4, 1, 1)


def start_where_the_port_is_taken() -> str:
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        os.environ["MASTER_PORT"] = str(taken.getsockname()[1])
        with pytest.raises(UserError) as refused:
            platform.start(LayoutSection(data_parallel_size=2), seed=1)
        return str(refused.value).replace(os.environ["MASTER_PORT"], "PORT")


def test_a_port_in_use_is_one_line() -> None:
    assert run_world(start_where_the_port_is_taken, 1) == [
        "MASTER_PORT PORT: in use on 127.0.0.1; set MASTER_PORT to a free one"
    ]
