"""Dumping: a resolved recipe as TOML loads back to an equal one and stays open to another layout."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_joy.recipe import dump_recipe, list_recipes, load_recipe
from megatron_joy.recipe.dump import format_value
from megatron_joy.recipe.fields import schema_rows

VARIANTS = [
    [],
    ["model.num_nextn_predict_layers=0"],
    ["train.validation_interval=0", "schedule.decay_steps=0"],
    ["data.train.1.manifest=other", "data.train.1.weight=0.25"],
    ['description=quotes " and \\ and \t tabs', "data.tokenizer=some folder/tok"],
    ["run.tensorboard=false", "run.folder=elsewhere"],
]


@pytest.mark.parametrize("name", [recipe.name for recipe in list_recipes()])
@pytest.mark.parametrize("overrides", VARIANTS, ids=range(len(VARIANTS)))
def test_a_dumped_recipe_loads_back_equal(tmp_path: Path, name: str, overrides: list[str]) -> None:
    if load_recipe(name).stages:  # they speak for the schedule and for the shares of the blend
        overrides = [text for text in overrides if not text.startswith(("schedule.", "data.train."))]
    recipe = load_recipe(name, overrides)
    text = dump_recipe(recipe)
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    again = load_recipe(str(path))
    assert again == recipe
    assert dump_recipe(again) == text


def test_a_dump_names_every_key_of_the_schema() -> None:
    text = dump_recipe(load_recipe("joyai_tiny_stages"))
    for key in schema_rows():
        name = key.rpartition(".")[2]
        assert any(
            line.lstrip("# ").startswith((f"{name} = ", f"[[{key.replace('.N', '')}]]")) for line in text.splitlines()
        ), key


def test_a_dumped_recipe_takes_another_layout(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(dump_recipe(load_recipe("joyai_tiny")), encoding="utf-8")
    layout = load_recipe(
        str(path), ["layout.tensor_model_parallel_size=2", "layout.pipeline_model_parallel_size=2"]
    ).layout
    assert layout.world_size == 8
    assert layout.pipeline_layer_counts == [2, 2]


text_values = st.text(st.characters(codec="utf-8"))


@settings(max_examples=200, deadline=None)
@given(st.recursive(text_values | st.integers(-(2**62), 2**62) | st.booleans() | st.floats(), st.lists, max_leaves=6))
def test_any_value_survives_toml(value: object) -> None:
    assert repr(tomllib.loads(f"value = {format_value(value)}")["value"]) == repr(value)
