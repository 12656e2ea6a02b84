"""`joy plan --layouts` ranks layouts that fit, the quickest first, and finds what long sequences need."""

import json

import pytest

from launch.layouts import candidates, ranked
from launch.plan import forms
from megatron_joy.cli.main import main
from megatron_joy.errors import UserError
from megatron_joy.parallel.gpus import GPUS
from megatron_joy.parallel.steptime import Assumptions, step_time
from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.derive import derive
from megatron_joy.recipe.validate import validate

H100 = GPUS["h100-80g"]


def test_every_candidate_is_a_valid_recipe() -> None:
    for recipe in forms(load_recipe("joyai_48b_a3b", ["layout.data_parallel_size=32"])):
        found = list(candidates(recipe, 64))
        assert len(found) > 20
        for each in found[:: max(1, len(found) // 12)]:
            assert each.layout.world_size == 64
            assert validate(derive(each.model_copy(update={"stages": []})), {}) == []


def test_interleaved_pipelines_are_searched_and_wait_less_at_an_updates_ends() -> None:
    found = list(candidates(forms(load_recipe("joyai_48b_a3b"))[0], 128))
    bubbles = {}
    for each in found:
        layout = each.layout
        if (layout.tensor_model_parallel_size, layout.context_parallel_size) == (1, 1):
            key = (layout.pipeline_model_parallel_size, layout.expert_model_parallel_size)
            time = step_time(each, H100, Assumptions())
            bubbles[*key, layout.virtual_pipeline_model_parallel_size] = time.bubble
    assert all(virtual == 1 for pipeline, _, virtual in bubbles if pipeline == 1)
    assert bubbles[4, 8, 2] == pytest.approx(bubbles[4, 8, 1] / 2, rel=0.1)  # (PP - 1) / VPP, the slowest stage apart


def test_layouts_are_ranked_and_the_papers_is_among_the_best() -> None:
    found = ranked(forms(load_recipe("joyai_48b_a3b"))[0], 128, H100, Assumptions(), 5)
    assert all(one.memory <= 0.95 * H100.memory for one in found)
    assert [one.time.seconds for one in found] == sorted(one.time.seconds for one in found)
    rows = [one.as_json() for one in found]
    assert (1, 2, 8) in [(row["tensor"], row["pipeline"], row["expert"]) for row in rows]  # arXiv 2604.03044


def test_the_command_shows_what_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "joyai_tiny", "--layouts", "2", "--kernels", "0.4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["layouts"]) == 2
    assert plan["assumptions"] == {"kernels": 0.4, "links": 0.8, "overlap": 0.0}
    assert plan["run"]["mfu"] == pytest.approx(plan["step"][0]["mfu"], rel=0.05)
    assert main(["plan", "joyai_tiny", "--mfu", "0.3"]) == 0
    assert "at the given MFU of 30.0%" in capsys.readouterr().out


def test_too_few_gpus_are_refused_with_what_is_needed() -> None:
    recipe = forms(load_recipe("joyai_48b_a3b"))[0]
    with pytest.raises(UserError, match=r"--gpus 2: no layout fits at sequence length 4096: the smallest needs"):
        ranked(recipe, 2, H100, Assumptions(), 3)
