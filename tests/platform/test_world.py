"""Worlds on this machine: ranks find each other, and whatever goes wrong ends in one message with nobody left."""

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_joy.errors import UserError
from megatron_joy.platform.world import WorldFailed, run_world, tell


def _sum_of_ranks(start: int) -> tuple[int, int]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor([start + dist.get_rank()])
    dist.all_reduce(value)
    print("said", dist.get_rank())
    return dist.get_rank(), int(value)


def _second_rank_raises() -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ArithmeticError("seven is odd")
    dist.all_reduce(torch.ones(1))


def _second_rank_dies() -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def _first_rank_hangs(pids: str) -> None:
    (Path(pids) / str(os.getpid())).touch()
    if os.environ["RANK"] == "0":
        time.sleep(1000)


def _mistaken() -> None:
    raise UserError("layout: no")


def _slow_but_talking() -> str:
    for step in range(7):
        time.sleep(0.6)
        tell(step)
    return "done"


def test_ranks_find_each_other_and_their_results_come_in_order(tmp_path: Path) -> None:
    assert run_world(_sum_of_ranks, 3, 10, log_folder=tmp_path) == [(0, 33), (1, 33), (2, 33)]
    assert "said 2" in (tmp_path / "rank_2.log").read_text()


def test_the_message_names_the_rank_that_raised_first() -> None:
    with pytest.raises(WorldFailed, match=r"^rank 1: ArithmeticError: seven is odd$") as failed:
        run_world(_second_rank_raises, 2)
    assert "in _second_rank_raises" in failed.value.details
    assert not failed.value.users_mistake


def test_the_message_names_the_rank_that_was_killed() -> None:
    with pytest.raises(WorldFailed, match=r"^rank 1: died with exit code -9$"):
        run_world(_second_rank_dies, 2)


def test_a_hang_ends_with_one_message_and_leaves_nobody(tmp_path: Path) -> None:
    with pytest.raises(WorldFailed, match=r"^rank 0: still running after 2 s") as failed:
        run_world(_first_rank_hangs, 2, str(tmp_path), patience=2.0)
    assert "_first_rank_hangs" in failed.value.log  # where it hangs
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


def test_a_users_mistake_on_a_rank_is_told_apart() -> None:
    with pytest.raises(WorldFailed) as failed:
        run_world(_mistaken, 1)
    assert failed.value.users_mistake


def test_ranks_that_report_are_not_taken_for_hanging() -> None:
    heard: list[tuple[int, int]] = []
    assert run_world(_slow_but_talking, 1, patience=3.0, on_message=lambda rank, x: heard.append((rank, x))) == ["done"]
    assert heard == [(0, step) for step in range(7)]
