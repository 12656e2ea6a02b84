"""Stopping and going on changes nothing: the same losses, bit for bit, on the same layout."""

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_joy.checkpoint.load import choose, load_checkpoint
from megatron_joy.errors import UserError
from tests.checkpoint import worlds
from tests.gloo import run_world


def _unbroken(layout: str, dtype: str, folder: Path, moments: Any = "fp32") -> Any:
    """Four steps; a checkpoint after the second, which must not disturb them."""
    run = worlds.Run.start(worlds.recipe(layout, dtype, moments))
    losses = run.train(1, 2)
    run.save(folder, 2)
    return losses + run.train(3, 4), run.boxes()


def _resumed(layout: str, dtype: str, folder: Path, moments: Any = "fp32") -> Any:
    run = worlds.Run.start(worlds.recipe(layout, dtype, moments))
    run.disturb()
    choice = choose(folder, run.process)
    assert choice.checkpoint is not None
    assert choice.notes == ()
    trainer = run.trainer
    state = load_checkpoint(choice.checkpoint, chunks=trainer.chunks, optimizer=trainer.optimizer, process=run.process)
    return run.train(state["step"] + 1, 4), run.boxes()


@pytest.mark.parametrize(
    ("layout", "dtype", "moments"),
    [
        ("one", "fp32", "fp32"),
        ("dp2", "bf16", "bf16"),
        ("ep2", "fp32", "fp32"),
        ("tp2ep2", "fp32", "fp32"),
        ("pp2vpp2", "bf16", "fp32"),
        ("cp2", "fp32", "fp32"),
    ],
)
def test_four_steps_are_two_and_two(tmp_path: Path, layout: str, dtype: str, moments: str) -> None:
    size = worlds.world_size(layout)
    unbroken = run_world(_unbroken, size, layout, dtype, tmp_path, moments)
    resumed = run_world(_resumed, size, layout, dtype, tmp_path, moments)
    for (losses, _), (after, _) in zip(unbroken, resumed, strict=True):
        assert after == losses[2:]
    end, end_resumed = (worlds.joined([boxes for _, boxes in ranks]) for ranks in (unbroken, resumed))
    assert [key for key in end if not np.array_equal(end[key], end_resumed[key])] == []


def test_going_on_under_another_layout_follows_the_unbroken_run(tmp_path: Path) -> None:
    unbroken = run_world(_unbroken, 2, "ep2", "fp32", tmp_path)[0][0]
    for layout in ("one", "pp2ep2"):
        after = run_world(_resumed, worlds.world_size(layout), layout, "fp32", tmp_path)[0][0]
        np.testing.assert_allclose(after, unbroken[2:], rtol=1e-5)


def _save_and_count_processes(folder: Path) -> tuple[int, int]:
    run = worlds.Run.start(worlds.recipe("ep2"))
    before = psutil.Process().num_threads()
    run.save(folder, 0)
    return len(psutil.Process().children(recursive=True)), psutil.Process().num_threads() - before


def test_saving_starts_no_process_and_leaves_no_thread(tmp_path: Path) -> None:
    for children, threads in run_world(_save_and_count_processes, 2, tmp_path):
        assert children == 0
        assert threads <= 0


def _save_twice(folder: Path) -> list[bool]:
    run = worlds.Run.start(worlds.recipe("dp2"))
    run.save(folder, 1)
    run.train(1, 1)
    run.save(folder, 1, attempt=1)
    checkpoint = choose(folder, run.process).checkpoint
    assert checkpoint is not None
    assert checkpoint.marker.attempt == 1
    assert checkpoint.marker.optimizer_step == 1
    return [path.name.startswith(".") for path in folder.iterdir()]


def test_a_second_checkpoint_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    assert run_world(_save_twice, 2, tmp_path) == [[False], [False]]


def _save_weights_only(folder: Path) -> None:
    run = worlds.Run.start(worlds.recipe("dp2"))
    run.trainer.optimizer = None  # type: ignore[assignment]
    run.save(folder, 0)


def _load_weights_only(folder: Path) -> str:
    run = worlds.Run.start(worlds.recipe("tp2"))
    wanted = run.boxes()
    run.disturb()
    try:
        run.load(folder / "step_00000000")
    except UserError as error:
        refusal = str(error)
    checkpoint = choose(folder, run.process).checkpoint
    assert checkpoint is not None
    load_checkpoint(checkpoint, chunks=run.trainer.chunks, optimizer=None, process=run.process)
    for (key, _, before), (_, _, after) in zip(wanted, run.boxes(), strict=True):
        assert np.array_equal(before, after), key
    return refusal


def test_weights_alone_can_be_saved_and_loaded_but_not_resumed_from(tmp_path: Path) -> None:
    run_world(_save_weights_only, 2, tmp_path)
    first, second = run_world(_load_weights_only, 2, tmp_path)
    assert first == second
    assert "has weights only, no optimizer state" in first
