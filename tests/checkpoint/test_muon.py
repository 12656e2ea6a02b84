"""Muon's momentum goes through checkpoints as AdamW's moments do: exactly, into any layout, and never into AdamW."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_joy.errors import UserError
from megatron_joy.recipe.schema import OptimizerSection, Recipe
from tests.checkpoint import worlds
from tests.gloo import run_world

STEP = "step_00000002"


def made(layout: str, dtype: str = "fp32", name: str = "muon") -> Recipe:
    return worlds.recipe(layout, dtype).model_copy(update={"optimizer": OptimizerSection(name=name)})


def _unbroken(recipe: Recipe, folder: Path) -> Any:
    run = worlds.Run.start(recipe)
    losses = run.train(1, 2)
    run.save(folder, 2)
    saved = run.boxes()
    return losses + run.train(3, 4), saved, run.boxes()


def _resumed(recipe: Recipe, folder: Path, more: int) -> Any:
    run = worlds.Run.start(recipe)
    run.disturb()
    run.load(folder / STEP)
    loaded = run.boxes()
    return run.train(3, 2 + more), loaded, run.boxes()


def differing(a: list[Any], b: list[Any]) -> list[str]:
    """Keys of tensors that don't have the same bits, joined over ranks."""
    first, second = worlds.joined(a), worlds.joined(b)
    assert first.keys() == second.keys()
    return [key for key in first if not np.array_equal(first[key], second[key])]


@pytest.mark.parametrize(("layout", "dtype"), [("ep2", "fp32"), ("dp2", "bf16")])
def test_resuming_has_the_bits_of_the_unbroken_run_and_other_layouts_its_state(
    layout: str, dtype: str, tmp_path: Path
) -> None:
    unbroken = run_world(_unbroken, 2, made(layout, dtype), tmp_path)
    resumed = run_world(_resumed, 2, made(layout, dtype), tmp_path, 2)
    assert [losses for losses, _, _ in resumed] == [losses[2:] for losses, _, _ in unbroken]
    assert differing([end for *_, end in unbroken], [end for *_, end in resumed]) == []
    assert any("momentum_buffer" in key for key, _, _ in unbroken[0][1])
    for other in {"fp32": ("one", "tp2etp2"), "bf16": ("pp2",)}[dtype]:
        elsewhere = run_world(_resumed, worlds.world_size(other), made(other, dtype), tmp_path, 0)
        assert differing([saved for _, saved, _ in unbroken], [loaded for _, loaded, _ in elsewhere]) == []


def _handed_on(recipe: Recipe, source: Path, target: Path) -> Any:
    """Loads what another layout wrote and writes it again."""
    run = worlds.Run.start(recipe)
    run.disturb()
    run.load(source / STEP)
    run.save(target, 2)
    return run.boxes()


def test_state_that_goes_from_layout_to_layout_keeps_its_bits(tmp_path: Path) -> None:
    """Every kind of split, written and read: TP, PP with VPP, CP, TP with EP, TP with ETP, PP with EP."""
    first = [saved for _, saved, _ in run_world(_unbroken, 2, made("tp2"), tmp_path / "tp2")]
    before = "tp2"
    for layout in ("pp2vpp2", "cp2", "tp2ep2", "tp2etp2", "pp2ep2", "dp2"):
        size = worlds.world_size(layout)
        held = run_world(_handed_on, size, made(layout), tmp_path / before, tmp_path / layout)
        assert differing(first, held) == [], layout
        before = layout


def _refusal(recipe: Recipe, folder: Path) -> str:
    run = worlds.Run.start(recipe)
    before = run.boxes()
    with pytest.raises(UserError) as caught:
        run.load(folder / STEP)
    assert all(np.array_equal(a, b) for (_, _, a), (_, _, b) in zip(before, run.boxes(), strict=True))
    return str(caught.value)


@pytest.mark.parametrize(("saved", "wanted"), [("adamw", "muon"), ("muon", "adamw")])
def test_a_checkpoint_of_the_other_optimizer_is_refused_in_a_line_that_names_both(
    saved: str, wanted: str, tmp_path: Path
) -> None:
    run_world(_unbroken, 1, made("one", name=saved), tmp_path)
    (told,) = run_world(_refusal, 1, made("one", name=wanted), tmp_path)
    assert told == (
        f'{tmp_path / STEP} has the state of optimizer.name = "{saved}", this run has "{wanted}"; '
        f'set optimizer.name = "{saved}" or start a new run.folder'
    )
