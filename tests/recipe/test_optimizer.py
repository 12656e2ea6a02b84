"""Muon's keys: what they default to, and that they are refused where no matrix is on Muon."""

import pytest

from megatron_joy.errors import UserError
from megatron_joy.recipe import check_resume, load_recipe
from megatron_joy.recipe.fields import schema_rows

MUON_KEYS = [key for key in schema_rows() if key.startswith("optimizer.muon_")]
VALUES = {
    "optimizer.muon_momentum": "0.9",
    "optimizer.muon_nesterov": "false",
    "optimizer.muon_coefficients": "quintic",
    "optimizer.muon_steps": "6",
    "optimizer.muon_update_rms": "0.3",
    "optimizer.muon_dtype": "bf16",
}


@pytest.mark.parametrize("key", MUON_KEYS)
def test_a_key_of_muon_is_refused_without_muon(key: str) -> None:
    with pytest.raises(UserError, match=f'{key} = .*has no effect with optimizer.name = "adamw", no matrix is on Muon'):
        load_recipe("joyai_tiny", [f"{key}={VALUES[key]}"])
    made = load_recipe("joyai_tiny", ["optimizer.name=muon", f"{key}={VALUES[key]}"])
    assert getattr(made.optimizer, key.partition(".")[2]) != schema_rows()[key].default


def test_the_iterations_number_format_is_the_weights() -> None:
    for dtype in ("fp32", "bf16"):
        made = load_recipe("joyai_tiny", ["optimizer.name=muon", f"precision.params_dtype={dtype}"])
        assert made.optimizer.muon_dtype == dtype


def test_a_run_keeps_its_optimizer() -> None:
    with pytest.raises(UserError, match=r'cannot resume .*optimizer\.name \("adamw" -> "muon"\)'):
        check_resume(load_recipe("joyai_tiny"), load_recipe("joyai_tiny", ["optimizer.name=muon"]))


def test_moments_in_bf16_are_adamw_s_and_stay_so() -> None:
    with pytest.raises(UserError, match=r'with optimizer.name = "muon" all state is fp32; set optimizer.moments_dtype'):
        load_recipe("joyai_tiny", ["optimizer.name=muon", "optimizer.moments_dtype=bf16"])
    with pytest.raises(UserError, match=r'cannot resume .*optimizer\.moments_dtype \("fp32" -> "bf16"\)'):
        check_resume(load_recipe("joyai_tiny"), load_recipe("joyai_tiny", ["optimizer.moments_dtype=bf16"]))
