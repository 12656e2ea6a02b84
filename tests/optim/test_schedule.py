"""The learning rate is a pure function of the step: warm-up, stable, decay, by closed form."""

import math
from typing import Any

import pytest

from megatron_joy.optim.schedule import learning_rate
from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.schema import Recipe, ScheduleSection

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


def test_the_48bs_stages_are_those_of_the_paper() -> None:
    made = load_recipe("joyai_48b_a3b")
    tokens = made.train.global_batch_size * made.data.sequence_length
    assert learning_rate(made, made.schedule.warmup_steps) == 4.2e-4
    assert made.schedule.warmup_steps * tokens == pytest.approx(100e9, rel=1e-3)  # arXiv 2604.03044, section 2.4
    assert learning_rate(made, made.train.steps) == pytest.approx(1.4e-4, rel=1e-9)
