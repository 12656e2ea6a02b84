"""`joy plan` judges the paper's layout and refuses what it can't plan for."""

import pytest

from launch.plan import fits, memory_plan
from megatron_joy.errors import UserError
from megatron_joy.parallel.gpus import GPUS, gpu_named
from megatron_joy.recipe import load_recipe


def test_what_does_not_fit_is_said_with_by_how_much() -> None:
    recipe = load_recipe("joyai_48b_a3b")
    for row in memory_plan(recipe, GPUS["h100-80g"]):
        assert row["total"] + row["spare"] == 80_000_000_000
        assert (row["spare"] < 0) == row["verdict"].startswith("too large by")
    whole = load_recipe("joyai_tiny")
    assert fits(whole, "h100-80g") is None
    one = load_recipe("joyai_48b_a3b", ["layout.expert_model_parallel_size=1"])
    assert "too large by" in (fits(one, "h100-80g") or "")


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="known are a100-80g"):
        gpu_named("h100")
