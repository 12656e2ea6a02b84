"""What gloo refuses and Megatron-core asks for: parts of different sizes."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_joy.platform import cpu
from tests.gloo import run_world

WORLD = 3
COLUMNS = 2


def part(rank: int, rows: int) -> Tensor:
    return torch.arange(rows * COLUMNS, dtype=torch.float32).view(rows, COLUMNS) + 100 * rank


def gathered(sizes: list[int]) -> Tensor:
    dist.init_process_group("gloo")
    out = torch.full((sum(sizes), COLUMNS), torch.nan)
    # Megatron-core hands in parts of one buffer.
    cpu.all_gather(list(out.split(sizes)), part(dist.get_rank(), sizes[dist.get_rank()]), group=dist.group.WORLD)
    return out.numpy()


def scattered(sizes: list[int]) -> Tensor:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    out = torch.full((sizes[rank], COLUMNS), torch.nan)
    whole = torch.arange(sum(sizes) * COLUMNS, dtype=torch.float32).view(-1, COLUMNS) * (rank + 1)
    cpu.reduce_scatter(out, list(whole.split(sizes)), group=dist.group.WORLD)
    return out.numpy()


def gloo_alone(sizes: list[int]) -> str:
    dist.init_process_group("gloo")
    out = torch.zeros(sum(sizes), COLUMNS)
    try:
        dist.all_gather(list(out.split(sizes)), part(dist.get_rank(), sizes[dist.get_rank()]))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 4, 2], [0, 3, 0]])
def test_parts_of_any_sizes_are_gathered(sizes: list[int]) -> None:
    expected = torch.cat([part(rank, rows) for rank, rows in enumerate(sizes)])
    for found in run_world(gathered, WORLD, sizes):
        assert torch.equal(torch.from_numpy(found), expected)


@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 4, 2], [0, 3, 0]])
def test_sums_are_scattered_in_parts_of_any_sizes(sizes: list[int]) -> None:
    whole = torch.arange(sum(sizes) * COLUMNS, dtype=torch.float32).view(-1, COLUMNS) * sum(range(1, WORLD + 1))
    for found, expected in zip(run_world(scattered, WORLD, sizes), whole.split(sizes), strict=True):
        assert torch.equal(torch.from_numpy(found), expected)


def test_gloo_itself_still_refuses_them() -> None:
    """When this fails, `cpu.all_gather` and `cpu.reduce_scatter` have become unnecessary."""
    assert all("invalid tensor size" in said for said in run_world(gloo_alone, WORLD, [1, 4, 2]))
