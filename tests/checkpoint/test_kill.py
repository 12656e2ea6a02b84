"""SIGKILL at any point of a save leaves the checkpoint before it chosen, or the new one whole; nothing in between."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_joy.checkpoint import save as save_module
from megatron_joy.checkpoint import storage
from megatron_joy.checkpoint.find import latest
from tests.checkpoint import worlds
from tests.gloo import WorldFailed, run_world


def _die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after(module: Any, name: str, owner: Any = None) -> None:
    """Dies just after a function has done its work."""
    where = owner or module
    original = getattr(where, name)

    def then_die(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        _die()

    setattr(where, name, then_die)


def _mid_file(run: worlds.Run) -> None:
    """Rank 1 dies in the middle of its tensors."""
    if run.process.is_first_rank:
        return
    original = storage._HashedStream.write

    def write(stream: Any, data: Any) -> int:
        if stream.size > 100_000:
            stream.raw.flush()
            _die()
        return original(stream, data)

    storage._HashedStream.write = write  # type: ignore[method-assign]


def _before_marker(run: worlds.Run) -> None:
    save_module.write_marker = _die


def _after_marker(run: worlds.Run) -> None:
    _after(save_module, "write_marker")


def _before_the_rename(run: worlds.Run) -> None:
    save_module._put_in_place = _die  # type: ignore[assignment]


def _after_the_rename(run: worlds.Run) -> None:
    _after(save_module, "_put_in_place")


def _between_the_renames(run: worlds.Run) -> None:
    """The old checkpoint of the step has stepped aside and the new one isn't there yet."""
    original = Path.rename

    def rename(path: Path, target: Any) -> Path:
        if ".writing-" in path.name:
            _die()
        return original(path, target)

    Path.rename = rename  # type: ignore[method-assign, assignment]


POINTS: dict[Callable[[worlds.Run], None], int] = {
    _mid_file: 1,
    _before_marker: 1,
    _after_marker: 1,
    _before_the_rename: 1,
    _after_the_rename: 2,
}


def _train_and_die(folder: Path, point: Callable[[worlds.Run], None], step: int) -> None:
    run = worlds.Run.start(worlds.recipe("ep2"))
    run.train(1, 1)
    run.save(folder, 1)
    run.train(2, 2)
    point(run)
    run.save(folder, step)


def _go_on(folder: Path) -> Any:
    run = worlds.Run.start(worlds.recipe("ep2"))
    found = latest(folder, full=True).checkpoint
    assert found is not None
    state = run.load(found.path)
    losses = run.train(state["step"] + 1, 3)
    run.save(folder, 3, attempt=1)
    return losses


def _unbroken() -> Any:
    return worlds.Run.start(worlds.recipe("ep2")).train(1, 3)


@pytest.fixture(scope="module")
def unbroken() -> Any:
    return run_world(_unbroken, 2)[0]


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.__name__.strip("_"))
def test_a_kill_leaves_a_whole_checkpoint_and_the_run_goes_on_bit_for_bit(
    tmp_path: Path, unbroken: Any, point: Callable[[worlds.Run], None]
) -> None:
    with pytest.raises(WorldFailed) as killed:
        run_world(_train_and_die, 2, tmp_path, point, 2)
    assert killed.value.exit_code == -signal.SIGKILL
    found = latest(tmp_path, full=True)
    assert found.checkpoint is not None
    assert found.checkpoint.step == POINTS[point]
    assert found.notes == ()
    assert run_world(_go_on, 2, tmp_path)[0] == unbroken[POINTS[point] :]
    found = latest(tmp_path, full=True)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 3


def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_old_one_chosen(tmp_path: Path, unbroken: Any) -> None:
    with pytest.raises(WorldFailed):
        run_world(_train_and_die, 2, tmp_path, _between_the_renames, 1)
    found = latest(tmp_path, full=True).checkpoint
    assert found is not None
    assert found.path.name == ".step_00000001.replaced"
    assert found.marker.optimizer_step == 1
    assert run_world(_go_on, 2, tmp_path)[0] == unbroken[1:]
