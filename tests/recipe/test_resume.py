"""Resume: a table over all keys says what a run may change in mid-course."""

import pytest

from megatron_joy.errors import UserError
from megatron_joy.recipe import check_resume, load_recipe
from megatron_joy.recipe.fields import schema_rows
from megatron_joy.recipe.resume import MAY_CHANGE, changes, may_change

BASE = "joyai_tiny"


@pytest.mark.parametrize(
    "overrides",
    [
        ["layout.data_parallel_size=1", "layout.expert_model_parallel_size=1"],
        ["train.steps=900", "schedule.peak_lr=1e-3", "schedule.decay_steps=50"],
        ["checkpoint.interval=7", "run.folder=elsewhere", "train.threads=2", "train.micro_batch_size=4"],
        ["model.max_position_embeddings=131072"],
        ["model.backend=portable", "model.router_bias_update_rate=0", "model.mtp_loss_factor=0.0"],
    ],
)
def test_layout_schedule_and_house_keeping_may_change(overrides: list[str]) -> None:
    check_resume(load_recipe(BASE), load_recipe(BASE, overrides))


@pytest.mark.parametrize(
    "override",
    [
        "model.hidden_size=256",
        "model.rope_theta=500000.0",
        "seed=5",
        "data.document_mask=false",
        "precision.params_dtype=bf16",
    ],
)
def test_what_defines_the_run_must_stay(override: str) -> None:
    with pytest.raises(UserError, match="cannot resume") as caught:
        check_resume(load_recipe(BASE), load_recipe(BASE, [override]))
    key = override.partition("=")[0]
    assert f"{key} (" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_differing_key_is_named_with_both_values() -> None:
    with pytest.raises(UserError) as caught:
        check_resume(load_recipe(BASE), load_recipe(BASE, ["model.hidden_size=256", "seed=5", "train.steps=400"]))
    assert "seed (1234 -> 5), model.hidden_size (128 -> 256)" in str(caught.value)
    assert "train.steps" not in str(caught.value)


def test_the_table_covers_every_key_and_has_no_stale_row() -> None:
    keys = [key for key in schema_rows() if ".N" not in key]
    for key in keys:
        may_change(key)
    stale = [row for row in MAY_CHANGE if not any(key == row or key.startswith(f"{row}.") for key in keys)]
    assert stale == []


def test_what_a_run_goes_on_with_is_told_by_key_with_both_values() -> None:
    old, fp8 = load_recipe(BASE), ["precision.fp8.recipe=tensorwise", "precision.fp8.emulate=true"]
    layout = ["layout.data_parallel_size=1", "layout.expert_model_parallel_size=1", "run.folder=elsewhere"]
    assert changes(old, load_recipe(BASE, layout)) == ""
    assert changes(old, load_recipe(BASE, ["optimizer.weight_decay=0.0", *layout, *fp8])) == (
        'precision.fp8.recipe ("off" -> "tensorwise"), precision.fp8.format (<none> -> "hybrid"), '
        "precision.fp8.emulate (false -> true), optimizer.weight_decay (0.1 -> 0.0)"
    )
    staged = load_recipe("joyai_tiny_stages", ["stages.1.mtp_loss_factor=0.1"])
    assert changes(load_recipe("joyai_tiny_stages"), staged) == "stages"
