"""A run moves through its stages by itself: the same bits after any kill, the same samples in any layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.timetable import Timetable
from tests.train.minuscule import (
    EP2,
    ONE,
    PP2,
    STAGED_STEPS,
    Outcome,
    die,
    last_rows,
    make_staged_home,
    numbers,
    signal_at,
    train,
    train_until_killed,
)
from tests.train.test_bad_input import the_one_line
from tests.train.test_other_layout import _note_samples, samples
from tests.train.test_stop import TERM

EDIT = 'stages.1.blend=[{source="letters", weight=1.0}, {source="digits", weight=1.0}]'


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with data and the recipe of three stages."""
    return make_staged_home(tmp_path_factory.mktemp("staged"))


@pytest.fixture(scope="module")
def whole(staged: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, dict[int, list[str]]]:
    """The run in one go, and the samples of each step."""
    folder = tmp_path_factory.mktemp("whole")
    ended = train(staged, folder / "run", ONE, before=_note_samples, inputs=(folder, None))
    assert ended.codes == [0]
    return ended, samples(folder)


def test_the_rows_are_the_timetables(staged: Path, whole: tuple[Outcome, Any]) -> None:
    timetable = Timetable(load_recipe(str(staged / "minuscule.toml")))
    rows = whole[0].rows
    assert [row["stage"] for row in rows] == ["warmup"] * 4 + ["decay"] * 3 + ["long"] * 3
    assert [row["global_batch_size"] for row in rows] == [4, 4, 8, 8, 8, 8, 8, 4, 4, 4]
    assert [row["sequence_length"] for row in rows] == [32] * 7 + [64] * 3
    for row in rows:
        plan = timetable.at(row["step"])
        assert (row["lr"], row["samples"], row["tokens"]) == (
            plan.learning_rate,
            plan.first_sample + plan.global_batch_size,
            plan.first_token + plan.tokens,
        )
        assert sum(row["sources"].values()) == plan.global_batch_size
    assert [row["mtp_loss"] is None for row in rows] == [True] * 4 + [False] * 6
    assert [message.split(",")[0] for message in whole[0].told("stage")] == [
        "stage warmup",
        "stage decay",
        "stage long",
    ]


def _stop_before(steps: list[int]) -> None:
    """Dies before the first of these steps that this attempt comes to, unless it began with it."""
    from megatron_joy.train.step import Trainer

    compute = Trainer.step
    began: list[int] = []

    def then(trainer: Any, number: int, batches: Any) -> Any:
        if began and number in steps:
            die()
        began.append(number)
        return compute(trainer, number, batches)

    Trainer.step = then  # type: ignore[method-assign]


def test_kills_at_each_border_and_in_the_ramp_change_no_bit(
    staged: Path, tmp_path: Path, whole: tuple[Outcome, Any]
) -> None:
    run, kills = tmp_path / "run", [2, 3, 5, 8, 9]
    for _ in kills:
        train_until_killed(staged, run, ONE, _stop_before, kills)
    ended = train(staged, run, ONE)
    assert [event["step"] for event in ended.events if event["kind"] == "resume"] == [1, 2, 4, 7, 8]
    assert numbers(last_rows(ended.rows)) == numbers(whole[0].rows)
    assert len(ended.rows) == STAGED_STEPS


def test_another_layout_has_the_same_samples_in_the_same_batches(
    staged: Path, tmp_path: Path, whole: tuple[Outcome, dict[int, list[str]]]
) -> None:
    run = tmp_path / "run"
    assert set(train(staged, run, EP2, before=_note_samples, inputs=(tmp_path, 3)).codes) == {75}
    assert set(train(staged, run, PP2, before=_note_samples, inputs=(tmp_path, 6)).codes) == {75}
    ended = train(staged, run, EP2, before=_note_samples, inputs=(tmp_path, None))
    assert samples(tmp_path) == whole[1]
    for mine, other in zip(last_rows(ended.rows), whole[0].rows, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["sources"] == other["sources"]


def test_a_blend_edited_in_mid_run_holds_from_there_and_kills_change_no_bit(
    staged: Path, tmp_path: Path, whole: tuple[Outcome, Any]
) -> None:
    edited = []
    for name in ("one", "two"):
        run = tmp_path / name
        assert train(staged, run, ONE, before=signal_at, inputs=(5, TERM)).codes == [75]
        if name == "two":
            train_until_killed_with(staged, run, EDIT)
        edited.append(train(staged, run, ONE, EDIT))
    one, two = edited
    assert numbers(last_rows(one.rows)) == numbers(last_rows(two.rows))
    assert numbers(last_rows(one.rows))[:5] == numbers(whole[0].rows)[:5]
    assert [sum(row["sources"][n] for row in one.rows[5:7]) for n in ("letters", "digits")] == [8, 8]
    assert one.told("note")[0] == "since step_00000005 the recipe was changed: stages"
    assert "the new one holds from update 6 on" in one.told("note")[1]
    ledger = json.loads((tmp_path / "one" / "ledger.json").read_text())
    assert [(entry["from_step"], entry["from_sample"]) for entry in ledger] == [(0, 0), (5, 32)]


def train_until_killed_with(home: Path, run: Path, *overrides: str) -> None:
    """Dies right after the first update under an edited recipe."""
    with pytest.raises(Exception, match="exit code -9"):
        train(home, run, ONE, *overrides, before=_stop_before, inputs=([7],))


def test_what_is_done_can_not_be_changed_and_nothing_is_touched(staged: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(staged, run, ONE, before=signal_at, inputs=(2, TERM))
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    line = the_one_line(train(staged, run, ONE, "stages.0.sequence_length=64"))
    assert "update 1 was trained with 4 x 32 tokens" in line
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_a_stage_that_needs_longer_documents_than_there_are_is_refused(staged: Path, tmp_path: Path) -> None:
    line = the_one_line(train(staged, tmp_path / "run", ONE, "stages.2.min_longest_document=64"))
    assert "stages.2.min_longest_document = 64: the longest document of digits" in line
    assert "tokens; give the stage a source with longer ones" in line
    assert not (tmp_path / "run").exists()
