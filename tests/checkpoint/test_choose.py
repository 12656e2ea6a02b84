"""All ranks choose the same checkpoint, each having read its share of the files, and hear the same reasons."""

from pathlib import Path
from typing import Any

import pytest

from megatron_joy.checkpoint.load import choose
from megatron_joy.checkpoint.marker import MARKER
from megatron_joy.checkpoint.together import RanksFailed, each, together
from megatron_joy.platform import process as platform
from tests.checkpoint import worlds
from tests.checkpoint.fakes import make_checkpoint
from tests.gloo import run_world


def _choose(folder: Path) -> Any:
    recipe = worlds.recipe("dp2")
    choice = choose(folder, platform.start(recipe.layout, recipe.seed))
    return choice.checkpoint and choice.checkpoint.step, choice.notes


def test_torn_ones_are_passed_over_whoever_reads_the_damage(tmp_path: Path) -> None:
    for step in range(1, 6):
        make_checkpoint(tmp_path, step)
    # In the order of the marker: rank 0 reads the first and the third file, rank 1 the second.
    for step, name in ((5, "__0_0.distcp"), (4, "__1_0.distcp"), (3, ".metadata")):
        path = tmp_path / f"step_{step:08d}" / name
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    (tmp_path / "step_00000002" / MARKER).unlink()
    first, second = run_world(_choose, 2, tmp_path)
    assert first == second
    step, notes = first
    assert step == 1
    assert [note.split()[1] for note in notes] == [f"step_{step:08d}" for step in (5, 4, 3, 2)]
    for note, part in zip(notes, ("__0_0.distcp", "__1_0.distcp", ".metadata", "not finished"), strict=True):
        assert part in note
        assert " more" not in note


def test_nothing_to_choose_from(tmp_path: Path) -> None:
    assert run_world(_choose, 2, tmp_path) == [(None, ()), (None, ())]


def _fail_on_one() -> tuple[str, int]:
    recipe = worlds.recipe("dp2")
    rank = platform.start(recipe.layout, recipe.seed).info.rank
    with pytest.raises(RanksFailed) as failed:
        together(lambda: 1 // (1 - rank))
    return str(failed.value), each(lambda: rank)


def test_a_failure_of_one_rank_is_raised_on_all_with_its_reason() -> None:
    assert run_world(_fail_on_one, 2) == [
        ("rank 1: ZeroDivisionError: integer division or modulo by zero", rank) for rank in (0, 1)
    ]
