"""The ledger: what was planned from which step on, what came to pass, and what may not change any more."""

import json
from fractions import Fraction

import pytest

from megatron_joy.errors import UserError
from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.ledger import (
    Stretch,
    as_json,
    begin,
    check_history,
    first_sample,
    from_json,
    go_on,
    in_force,
    is_skipped,
    outdated,
    planned_tokens,
    rollbacks,
    skipped_updates,
    with_rollback,
    with_skipped,
)
from megatron_joy.recipe.timetable import Timetable

BASE = "joyai_tiny_stages"
OLD, NEW = (("code", 0.75), ("prose", 0.25)), (("code", 0.25), ("prose", 0.75))
EDIT = "stages.1.blend=[{source='code', weight=0.5}, {source='prose', weight=0.5}]"
EDITED = (("code", 0.5), ("prose", 0.5))


def test_stages_of_one_length_and_blend_are_one_stretch() -> None:
    (entry,) = begin(load_recipe(BASE))
    # 144 samples of the warm-up and 192 of the stable stage, whose blend is the same.
    assert entry.stretches == (
        Stretch(0, 336, 128, OLD),
        Stretch(336, 192, 128, NEW),
        Stretch(528, 96, 512, (("prose", 1.0),)),
    )


def test_the_same_recipe_adds_nothing_at_any_step() -> None:
    recipe = load_recipe(BASE)
    for step in range(49):
        assert go_on(begin(recipe), recipe, step) == begin(recipe)


def test_an_edit_holds_from_its_step_on() -> None:
    ledger = go_on(begin(load_recipe(BASE)), load_recipe(BASE, [EDIT]), 15)
    done = 144 + 3 * 16
    assert [entry.from_step for entry in ledger] == [0, 15]
    assert in_force(ledger) == [
        Stretch(0, done, 128, OLD),
        Stretch(done, 336 - done, 128, EDITED),
        Stretch(336, 192, 128, NEW),
        Stretch(528, 96, 512, (("prose", 1.0),)),
    ]
    assert go_on(ledger, load_recipe(BASE, [EDIT]), 20) == ledger
    # Going back to a checkpoint before the edit: its ledger doesn't have it, and the edit holds from there.
    assert [entry.from_step for entry in go_on(ledger, load_recipe(BASE, [EDIT]), 13)] == [0, 13]


def test_an_edit_of_what_is_over_adds_nothing() -> None:
    ledger = begin(load_recipe(BASE))
    assert go_on(ledger, load_recipe(BASE, [EDIT]), 30) == ledger


def test_more_steps_of_the_same_add_nothing() -> None:
    ledger = begin(load_recipe("joyai_tiny"))
    assert go_on(ledger, load_recipe("joyai_tiny", ["train.steps=900"]), 200) == ledger


def test_planned_tokens_are_those_of_the_entry_that_named_the_source_first() -> None:
    plan = {
        "code": {128: Fraction(3, 4) * 336 * 128 + Fraction(1, 4) * 192 * 128},
        "prose": {128: Fraction(1, 4) * 336 * 128 + Fraction(3, 4) * 192 * 128, 512: Fraction(96 * 512)},
    }
    ledger = begin(load_recipe(BASE))
    assert planned_tokens(ledger) == plan
    assert planned_tokens(go_on(ledger, load_recipe(BASE, [EDIT]), 15)) == plan


def test_a_ledger_comes_back_from_json() -> None:
    ledger = go_on(begin(load_recipe(BASE)), load_recipe(BASE, [EDIT]), 15)
    ledger = with_skipped(with_rollback(ledger, load_recipe(BASE, [EDIT]), 17, 18, "a spike"), 21)
    assert from_json(json.loads(json.dumps(as_json(ledger)))) == ledger
    for damaged in (None, [{}], [{"from_step": "x"}], 3):
        with pytest.raises(UserError, match="not a run's ledger"):
            from_json(damaged)


@pytest.mark.parametrize(
    "overrides",
    [
        ["stages.3.tokens=81920", "train.steps=56"],
        ["stages.2.steps=20", "train.steps=56"],
        ["stages.3.rope_theta=5000.0", "stages.3.sequence_length=256", "stages.3.tokens=24576"],
        [EDIT, "stages.0.end_lr=1e-3"],
    ],
)
def test_what_is_not_done_yet_may_change(overrides: list[str]) -> None:
    before, edited = load_recipe(BASE), load_recipe(BASE, overrides)
    assert edited != before
    check_history(before, edited, 20)


@pytest.mark.parametrize(
    ("overrides", "done", "found"),
    [
        (["stages.0.ramp_increment=8"], 9, "update 5 was trained with 12 x 128 tokens"),
        (["stages.0.steps=14", "train.steps=50"], 9, "update 5 was trained with 12 x 128"),
        (["stages.1.rope_theta=5000.0"], 13, "update 13 was trained with 16 x 128 tokens and rotary base 10000"),
        (["stages.1.sequence_length=64", "stages.1.steps=24", "train.steps=60"], 20, "now has 16 x 64 tokens"),
        (["stages.1.steps=4", "train.steps=40"], 30, "update 29 was trained with 16 x 128"),
    ],
)
def test_what_is_done_can_not_become_something_else(overrides: list[str], done: int, found: str) -> None:
    with pytest.raises(UserError, match="cannot resume") as caught:
        check_history(load_recipe(BASE), load_recipe(BASE, overrides), done)
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_may_not_be_over_before_what_it_has_done() -> None:
    with pytest.raises(UserError, match=r"update 151 .*nothing \(it is over\)"):
        check_history(
            load_recipe("joyai_tiny"), load_recipe("joyai_tiny", ["train.steps=150", "schedule.decay_steps=9"]), 160
        )


def test_today_s_batch_and_length_are_held_in_a_run_of_one_stage_too() -> None:
    for override in ("train.global_batch_size=16", "data.sequence_length=128"):
        with pytest.raises(UserError, match="update 1 was trained with 8 x 256 tokens"):
            check_history(load_recipe("joyai_tiny"), load_recipe("joyai_tiny", [override]), 7)
        check_history(load_recipe("joyai_tiny"), load_recipe("joyai_tiny", [override]), 0)


@pytest.mark.parametrize(
    "spans",
    [[(7, 7)], [(10, 14)], [(27, 30), (31, 40)], [(12, 15), (13, 14), (9, 20)], [(40, 48), (40, 48)]],
    ids=["one update", "over two stages", "over two blends", "overlapping", "the end, twice"],
)
def test_a_rollback_leaves_out_exactly_the_samples_of_its_updates(spans: list[tuple[int, int]]) -> None:
    """Against a run that is played through: a cursor that reads on, whatever update it reads for."""
    recipe = load_recipe(BASE)
    timetable, ledger = Timetable(recipe), begin(recipe)
    cursor, read, update = 0, dict[int, int](), 0
    for first, last in [*spans, (None, timetable.steps)]:
        while update < last:
            update += 1
            read[update] = cursor
            cursor += timetable.at(update).global_batch_size
        if first is not None:
            ledger, update = with_rollback(ledger, recipe, first, last, "a spike"), first - 1
    assert {u: first_sample(ledger, timetable, u) for u in read} == read
    assert rollbacks(ledger) == len(spans)
    reading = in_force(ledger)
    for number, sample in read.items():
        stage = timetable.at(number).stage
        stretch = max((x for x in reading if x.start <= sample), key=lambda x: x.start)
        assert (stretch.sequence_length, stretch.blend) == (stage.sequence_length, stage.blend)


def test_skipped_updates_are_kept_and_those_that_a_rollback_undoes_are_not() -> None:
    recipe = load_recipe(BASE)
    ledger = with_skipped(with_skipped(with_skipped(begin(recipe), 20), 5), 22)
    assert skipped_updates(ledger) == [5, 20, 22]
    ledger = with_skipped(with_rollback(ledger, recipe, 21, 23, "a spike"), 24)
    assert skipped_updates(ledger) == [5, 20, 24]
    assert [update for update in range(1, 49) if is_skipped(ledger, update)] == [5, 20, 24]


@pytest.mark.parametrize("done", [6, 12, 14, 15, 30])
def test_decisions_hold_after_any_checkpoint(done: int) -> None:
    recipe = load_recipe(BASE)
    ledger = with_skipped(with_rollback(begin(recipe), recipe, 13, 14, "a spike"), 20)
    assert go_on(ledger, recipe, done) == ledger


def test_a_checkpoint_with_updates_that_were_gone_back_on_is_outdated_and_no_other_is() -> None:
    recipe = load_recipe(BASE)
    before = begin(recipe)
    once = with_rollback(before, recipe, 13, 14, "a spike")
    twice = with_rollback(once, recipe, 20, 22, "a spike")
    assert [step for step in range(49) if outdated(before, step, once)] == list(range(13, 49))
    assert [step for step in range(49) if outdated(once, step, twice)] == list(range(20, 49))
    assert not any(outdated(ledger, step, ledger) for ledger in (before, once, twice) for step in range(49))
    # An edit on resume is no reason to forget a checkpoint.
    assert not any(outdated(before, step, go_on(before, load_recipe(BASE, [EDIT]), 15)) for step in range(49))


def test_an_edit_forgets_decisions_about_updates_that_it_changes_and_keeps_earlier_ones() -> None:
    recipe, edited = load_recipe(BASE), load_recipe(BASE, [EDIT])
    ledger = with_skipped(with_rollback(with_skipped(begin(recipe), 3), recipe, 13, 14, "a spike"), 20)
    before = go_on(ledger, edited, 12)
    assert [(entry.from_step, entry.from_sample, entry.skipped) for entry in before] == [(0, 0, (3,)), (12, 144, ())]
    after = go_on(ledger, edited, 16)
    assert [(entry.from_step, entry.reason, entry.skipped) for entry in after] == [
        (0, "", (3,)),
        (12, "a spike", ()),
        (16, "", ()),
    ]
    # Two updates of 16 samples were left out: update 17 begins 4 x 16 samples after the stage and these.
    assert after[-1].from_sample == 144 + 2 * 16 + 4 * 16
    assert go_on(after, edited, 18) == after
