"""What a recipe may say about FP8."""

import pytest

from megatron_joy.errors import UserError
from megatron_joy.recipe import load_recipe

TINY = "joyai_tiny"
ROPE = "model.qk_rope_head_dim=32"  # with it 32 divides every width


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        load_recipe(TINY, list(overrides))
    return str(refused.value)


@pytest.mark.parametrize(
    ("scaling", "gradients"),
    [("off", None), ("delayed", "hybrid"), ("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")],
)
def test_the_gradients_format_follows_from_the_recipe_and_can_be_set(scaling: str, gradients: str | None) -> None:
    assert load_recipe(TINY, [ROPE, f"precision.fp8.recipe={scaling}"]).precision.fp8.format == gradients
    if gradients:
        other = load_recipe(TINY, [ROPE, f"precision.fp8.recipe={scaling}", "precision.fp8.format=hybrid"])
        assert other.precision.fp8.format == "hybrid"


@pytest.mark.parametrize("key", ["format=e4m3", "emulate=true", 'high_precision=["attention"]'])
def test_a_key_without_fp8_has_no_effect_and_is_refused(key: str) -> None:
    assert 'has no effect with precision.fp8.recipe = "off", no product is in FP8' in refusal(f"precision.fp8.{key}")


def test_widths_that_fp8_cannot_have_are_named_with_their_part_s_way_out() -> None:
    said = refusal("precision.fp8.recipe=mxfp8", "model.kv_lora_rank=48", "model.moe_intermediate_size=40")
    assert "must be multiples of 32 wide, and model.kv_lora_rank = 48" in said
    assert "model.moe_intermediate_size / ETP = 40" in said
    spared = 'precision.fp8.high_precision=["attention", "routed_experts", "shared_experts"]'
    keys = ["precision.fp8.recipe=mxfp8", "model.kv_lora_rank=48", "model.moe_intermediate_size=40", spared]
    assert load_recipe(TINY, keys).precision.fp8.recipe == "mxfp8"


def test_sparing_every_part_is_refused() -> None:
    parts = '["attention", "dense_mlp", "shared_experts", "routed_experts", "mtp_projection"]'
    said = refusal("precision.fp8.recipe=blockwise", f"precision.fp8.high_precision={parts}")
    assert 'set precision.fp8.recipe = "off"' in said


def test_emulation_under_transformer_engine_is_refused() -> None:
    said = refusal("precision.fp8.recipe=blockwise", "precision.fp8.emulate=true", "model.backend=te")
    assert "set precision.fp8.emulate = false" in said


def test_a_part_that_does_not_exist_is_one_line() -> None:
    said = refusal("precision.fp8.recipe=blockwise", 'precision.fp8.high_precision=["head"]')
    assert "precision.fp8.high_precision" in said and '"head"' in said


def test_a_delayed_scale_looks_back_as_transformer_engine_s_does_unless_the_newest_amax_is_enough() -> None:
    fp8 = load_recipe(TINY, ["precision.fp8.recipe=delayed"]).precision.fp8
    assert (fp8.amax_history_len, fp8.amax_compute_algo, fp8.margin) == (1024, "max", 0)
    newest = ["precision.fp8.recipe=delayed", "precision.fp8.amax_compute_algo=most_recent"]
    assert load_recipe(TINY, newest).precision.fp8.amax_history_len == 1
    assert "only the newest amax is looked at" in refusal(*newest, "precision.fp8.amax_history_len=16")


@pytest.mark.parametrize("key", ["amax_history_len=16", "amax_compute_algo=most_recent", "margin=1"])
def test_what_only_delayed_scaling_has_is_refused_elsewhere(key: str) -> None:
    assert "only delayed scaling looks back" in refusal("precision.fp8.recipe=tensorwise", f"precision.fp8.{key}")


def test_emulated_delayed_scaling_refuses_to_compute_a_forward_pass_again() -> None:
    keys = ["precision.fp8.recipe=delayed", "train.recompute=selective"]
    assert 'set train.recompute = "none"' in refusal(*keys, "precision.fp8.emulate=true")
    assert load_recipe(TINY, keys).train.recompute == "selective"  # Transformer Engine keeps its scales for it
