"""The timetable: learning rate by closed form, ramps and stage lengths by counting, the paper's figures in the 48B."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.schema import Recipe, ScheduleSection
from megatron_joy.recipe.timetable import Ramp, Timetable, as_of, rate_key, steps_for

PEAK, FINAL, WARMUP, DECAY, STEPS = 4e-3, 1e-3, 10, 20, 100


def recipe(**schedule: Any) -> Recipe:
    keys = {"peak_lr": PEAK, "final_lr": FINAL, "warmup_steps": WARMUP, "decay_steps": DECAY} | schedule
    tiny = load_recipe("joyai_tiny")
    train = tiny.train.model_copy(update={"steps": STEPS})
    return tiny.model_copy(update={"schedule": ScheduleSection(**keys), "train": train})


def test_warm_up_is_linear_and_its_last_step_has_the_peak() -> None:
    made = recipe()
    for step in range(1, WARMUP + 1):
        assert learning_rate(made, step) == pytest.approx(PEAK * step / WARMUP, rel=1e-12)
    assert learning_rate(made, WARMUP) == PEAK


def test_between_warm_up_and_decay_the_rate_is_the_peak() -> None:
    made = recipe()
    assert {learning_rate(made, step) for step in range(WARMUP, STEPS - DECAY + 1)} == {PEAK}


@pytest.mark.parametrize(
    ("shape", "remaining"),
    [("cosine", lambda part: 0.5 * (1 + math.cos(math.pi * part))), ("linear", lambda part: 1 - part)],
)
def test_decay_has_its_shape_and_ends_with_the_final_rate(shape: str, remaining: object) -> None:
    made = recipe(decay_shape=shape)
    for into in range(1, DECAY + 1):
        expected = FINAL + (PEAK - FINAL) * remaining(into / DECAY)  # type: ignore[operator]
        assert learning_rate(made, STEPS - DECAY + into) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(made, STEPS) == pytest.approx(FINAL, rel=1e-12)


def test_without_warm_up_and_decay_every_step_has_the_peak() -> None:
    made = recipe(warmup_steps=0, decay_steps=0)
    assert {learning_rate(made, step) for step in range(1, STEPS + 1)} == {PEAK}


def learning_rate(made: Recipe, step: int) -> float:
    return Timetable(made).at(step).learning_rate


# arXiv 2604.03044, 2.4: learning rates at both ends, tokens of a batch at both ends, sequence length, MTP factor.
PAPER = {
    "warmup": (0.0, 4.2e-4, 13e6, 38e6, 4096, 0.0),
    "stable": (4.2e-4, 4.2e-4, 38e6, 38e6, 4096, 0.0),
    "code_math": (4.2e-4, 1.4e-4, 38e6, 38e6, 4096, 0.0),
    "mid_training": (1.4e-4, 4.2e-5, 38e6, 38e6, 4096, 0.1),
    "long_64k": (4.2e-5, 3.2e-5, 34e6, 34e6, 65536, 0.1),
    "long_128k": (3.2e-5, 2.0e-5, 34e6, 34e6, 131072, 0.1),
}


def test_the_48bs_stages_have_the_papers_figures() -> None:
    timetable = Timetable(load_recipe("joyai_48b_a3b"))
    assert [stage.name for stage in timetable.stages] == list(PAPER)
    for stage, (start, end, first, last, length, mtp) in zip(timetable.stages, PAPER.values(), strict=True):
        assert stage.rate(stage.steps) == pytest.approx(end, rel=1e-12)
        assert stage.curves[0].start == pytest.approx(start, rel=1e-12)
        assert stage.ramp.size(0) * length == pytest.approx(first, rel=0.02)
        assert stage.ramp.size(stage.steps - 1) * length == pytest.approx(last, rel=0.02)
        assert (stage.sequence_length, stage.mtp_loss_factor, stage.rope_theta) == (length, mtp, 3.2e7)
    assert timetable.stages[0].tokens == pytest.approx(100e9, rel=1e-3)
    assert timetable.tokens == pytest.approx(20.7e12, rel=1e-4)


def test_a_stage_goes_on_at_the_rate_where_the_one_before_ended() -> None:
    made = load_recipe("joyai_tiny_stages")
    rates = [learning_rate(made, step) for step in range(1, 49)]
    assert rates[:12] == pytest.approx([3e-3 * i / 12 for i in range(1, 13)], rel=1e-12)
    assert rates[12:24] == [3e-3] * 12
    cosine = [0.5 * (1 + math.cos(math.pi * i / 12)) for i in range(1, 13)]
    assert rates[24:36] == pytest.approx([1e-3 + 2e-3 * part for part in cosine], rel=1e-12)
    assert rates[36:] == pytest.approx([3e-4 + 7e-4 * part for part in cosine], rel=1e-12)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 12), st.integers(1, 5))
def test_a_ramp_counts_as_its_formula_says(steps: int, first: int, grows: int, increment: int) -> None:
    ramp = Ramp(steps, first, first + grows * increment, increment)
    sizes = [first + increment * (i * (grows + 1) // steps) for i in range(steps)]
    assert [ramp.size(i) for i in range(steps)] == sizes
    assert [ramp.before(i) for i in range(steps + 1)] == [sum(sizes[:i]) for i in range(steps + 1)]
    stretches = [*ramp.sizes(), (steps, 0)]
    assert [size for (a, size), (b, _) in pairwise(stretches) for _ in range(a, b)] == sizes


@given(st.integers(1, 4000), st.integers(1, 8), st.integers(1, 9), st.integers(0, 12), st.integers(1, 5))
def test_a_stage_of_tokens_has_the_fewest_updates_that_reach_them(
    tokens: int, length: int, first: int, grows: int, increment: int
) -> None:
    def reached(steps: int) -> int:
        return length * Ramp(steps, first, first + grows * increment, increment).before(steps)

    found = steps_for(tokens, length, first, first + grows * increment, increment)
    assert found == next(steps for steps in range(1, 5000) if reached(steps) >= tokens)


def test_the_samples_of_steps_follow_each_other_without_gap_or_overlap() -> None:
    timetable = Timetable(load_recipe("joyai_tiny_stages"))
    samples = tokens = 0
    for number in range(1, timetable.steps + 1):
        plan = timetable.at(number)
        assert (plan.first_sample, plan.first_token) == (samples, tokens)
        assert timetable.samples_before(number - 1) == samples
        samples, tokens = samples + plan.global_batch_size, tokens + plan.tokens
    assert (timetable.samples, timetable.tokens) == (samples, tokens) == (624, 116736)
    sizes = [timetable.at(number).global_batch_size for number in (1, 4, 5, 8, 9, 12, 13, 36, 37, 48)]
    assert sizes == [8, 8, 12, 12, 16, 16, 16, 16, 8, 8]
    for outside in (0, 49):
        with pytest.raises(IndexError):
            timetable.at(outside)


def test_a_recipe_without_stages_is_one_stage() -> None:
    made = recipe()
    (stage,) = Timetable(made).stages
    assert (stage.steps, stage.samples, stage.sequence_length) == (STEPS, STEPS * 8, 256)
    assert (stage.mtp_loss_factor, stage.rope_theta, stage.blend) == (0.1, 1e4, (("data/demo/train", 1.0),))


def test_weights_are_used_with_the_base_of_the_stage_that_trained_them_last() -> None:
    made = load_recipe("joyai_tiny_stages")
    assert [as_of(made, done).model.rope_theta for done in (0, 1, 36, 37, 48, 99)] == [1e4, 1e4, 1e4, 4e4, 4e4, 4e4]
    assert as_of(load_recipe("joyai_tiny"), 10) == load_recipe("joyai_tiny")


def test_the_key_to_lower_is_where_the_stages_highest_rate_is_written() -> None:
    plain, staged = load_recipe("joyai_tiny"), load_recipe("joyai_tiny_stages")
    assert [rate_key(plain, stage) for stage in Timetable(plain).stages] == ["schedule.peak_lr"]
    warmup = "stages.0.end_lr"  # the stages after it hold that rate, and come down from it
    assert [rate_key(staged, stage) for stage in Timetable(staged).stages] == [
        warmup,
        warmup,
        warmup,
        "stages.2.end_lr",
    ]
    held = load_recipe("joyai_tiny_stages", ["stages.1.start_lr=2e-3"])
    assert [rate_key(held, stage) for stage in Timetable(held).stages[1:3]] == ["stages.1.start_lr"] * 2
