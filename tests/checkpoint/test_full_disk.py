"""A disk that refuses: all ranks learn of it, the last checkpoint survives, the run can go on from memory.

The kernel itself refuses here, by a limit on the size of the files that one rank may write (RLIMIT_FSIZE).
"""

import errno
import resource
from pathlib import Path
from typing import Any

import pytest

from megatron_joy.checkpoint import save as save_module
from megatron_joy.checkpoint.find import latest
from megatron_joy.errors import WorkError
from tests.checkpoint import worlds
from tests.gloo import run_world


def _refuse_writing(folder: Path, full_rank: int, limit: int) -> Any:
    run = worlds.Run.start(worlds.recipe("ep2"))
    losses = run.train(1, 1)
    run.save(folder, 1)
    losses += run.train(2, 2)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.process.info.rank == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    message = ""
    try:
        run.save(folder, 2)
    except WorkError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    names = sorted(path.name for path in folder.iterdir())
    losses += run.train(3, 3)
    run.save(folder, 3)  # there is room again
    return message, names, losses


def _unbroken() -> Any:
    return worlds.Run.start(worlds.recipe("ep2")).train(1, 3)


@pytest.fixture(scope="module")
def unbroken() -> Any:
    return run_world(_unbroken, 2)[0]


# In the middle of a rank's tensors, on either rank; 0: the very first byte.
@pytest.mark.parametrize(("full_rank", "limit"), [(1, 200_000), (0, 200_000), (1, 0)])
def test_a_full_disk_is_told_on_all_ranks_and_training_goes_on(
    tmp_path: Path, unbroken: Any, full_rank: int, limit: int
) -> None:
    ranks = run_world(_refuse_writing, 2, tmp_path, full_rank, limit)
    for message, names, losses in ranks:
        assert message == ranks[0][0]
        assert f"rank {full_rank}: File too large" in message
        assert message.endswith("the last whole one is step_00000001")
        assert names == ["step_00000001"]
        assert losses == unbroken
    found = latest(tmp_path, full=True)
    assert found.notes == ()
    assert found.checkpoint is not None
    assert found.checkpoint.step == 3


def _refuse_the_marker(folder: Path) -> str:
    run = worlds.Run.start(worlds.recipe("dp2"))

    def no_space(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save_module.write_marker = no_space
    with pytest.raises(WorkError) as refused:
        run.save(folder, 1)
    assert list(folder.iterdir()) == []
    return str(refused.value)


def test_a_disk_that_is_full_at_the_commit_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    first, second = run_world(_refuse_the_marker, 2, tmp_path)
    assert first == second
    assert first.endswith("rank 0: No space left on device; there is no whole one yet")


def _no_folder(folder: Path) -> str:
    run = worlds.Run.start(worlds.recipe("dp2"))
    with pytest.raises(WorkError) as refused:
        run.save(folder, 1)
    return str(refused.value)


def test_a_folder_that_cannot_be_made_is_told_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    first, second = run_world(_no_folder, 2, tmp_path / "checkpoints")
    assert first == second
    assert "rank 0: File exists" in first
