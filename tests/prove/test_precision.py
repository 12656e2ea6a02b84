"""Layouts in the recipe's own number format: no farther from one process than rounding explains."""

import json
from typing import Any

import pytest

from megatron_joy.cli import prove_command
from megatron_joy.cli.main import main
from megatron_joy.prove import proof as proving
from megatron_joy.prove.numbers import ParameterDifference, Routing, Validation
from megatron_joy.prove.proof import Proof, hold_against, prove
from megatron_joy.prove.shrink import Shrunk, in_fp32, shrink
from megatron_joy.recipe import load_recipe
from tests.prove.conftest import AloneOf
from tests.prove.test_proof import made

BF16 = "precision.params_dtype=bf16"
COST = {"loss": 1e-4, "mtp_loss": 3e-4, "validation": 2e-4, "grad_norm": 2e-3, "parameters": 1e-2, "ties": 1e-3}
WITHIN: dict[str, Any] = {
    "loss": 4.0 * (1 + 5.9e-4),  # twice the largest of the three losses' costs
    "grad_norm": 0.5 * (1 - 3.9e-3),
    "validation": (Validation(4.0, 5.0), Validation(4.0, 5.0 * (1 - 5.9e-4))),
    "worst": ParameterDifference("decoder.x", 1.0, 1.9e-2),
    "routing": Routing(100, 1, 1.9e-3),
}
BEYOND: dict[str, Any] = {
    "loss": 4.0 * (1 + 6.1e-4),
    "grad_norm": 0.5 * (1 - 4.1e-3),
    "validation": (Validation(4.0, 5.0), Validation(4.0, 5.0 * (1 - 6.1e-4))),
    "worst": ParameterDifference("decoder.x", 1.0, 2.1e-2),
    "routing": Routing(100, 1, 2.1e-3),
}


def test_twice_what_the_format_costs_one_process_is_allowed() -> None:
    assert made(format_cost=COST, **WITHIN).holds
    assert not made(**WITHIN).holds  # in fp32


@pytest.mark.parametrize("wrong", BEYOND)
def test_more_than_that_is_not(wrong: str) -> None:
    assert not made(format_cost=COST, **WITHIN | {wrong: BEYOND[wrong]}).holds


@pytest.mark.parametrize("fp8", ["off", "delayed", "tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("degrees", [{}, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}], ids=str)
def test_a_recipe_in_small_keeps_its_number_format(fp8: str, degrees: dict[str, int]) -> None:
    keys = ["train.recompute=none", f"precision.fp8.recipe={fp8}", *(f"layout.{k}={v}" for k, v in degrees.items())]
    recipe = load_recipe("joyai_48b_a3b", keys)
    small = shrink(recipe, 16, 12, own_precision=True).recipe  # raises when a rule of recipes is broken
    assert (small.precision.params_dtype, small.precision.fp8.recipe) == ("bf16", fp8)
    assert small.precision.fp8.emulate == (fp8 != "off")
    assert small.model.hidden_size < recipe.model.hidden_size
    plain = in_fp32(small)
    assert (plain.precision.params_dtype, plain.precision.fp8.recipe) == ("fp32", "off")
    assert (plain.model, plain.data, plain.seed) == (small.model, small.data, small.seed)


@pytest.fixture(scope="module")
def in_bf16() -> Shrunk:
    return shrink(load_recipe("joyai_tiny", [BF16]), 2, proving.STEPS_BEFORE + 4, own_precision=True)


def test_a_layout_in_bf16_follows_one_process_in_bf16(alone_of: AloneOf, in_bf16: Shrunk) -> None:
    proof = hold_against(alone_of(in_bf16), in_bf16)
    assert proof.shrunk.recipe.precision.params_dtype == "bf16" and proof.format_cost is not None
    assert proof.holds, (proof.differences, proof.format_cost, proof.worst, proof.routing)
    # bf16 has 8 bits: its cost is of that size, and the layout isn't fp32 in disguise.
    assert 1e-6 < proof.format_cost["loss"] < 1e-2
    assert proof.differences["parameters"] > 1e-5
    told = proof.as_json()
    assert told["format_cost"] == proof.format_cost
    assert told["tolerances"]["grad_norm"] == 2 * proof.format_cost["grad_norm"]
    assert json.dumps(told)


@pytest.mark.slow
def test_a_layout_in_emulated_fp8_follows_one_process_in_fp8() -> None:
    keys = [BF16, "precision.fp8.recipe=blockwise", "precision.fp8.emulate=true"]
    proof = prove(load_recipe("joyai_tiny", keys), processes=2, steps=4, own_precision=True)
    assert proof.holds, (proof.differences, proof.format_cost, proof.worst, proof.routing)


def test_expert_gradients_reduced_over_the_wrong_ranks_are_noticed_in_bf16(
    alone_of: AloneOf, in_bf16: Shrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proving, "FOLLOW", "tests.prove.sabotage:experts_reduced_like_dense_weights")
    assert not hold_against(alone_of(in_bf16), in_bf16).holds


def test_the_command_passes_the_precision_on(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked = []

    def proved(*args: Any) -> Proof:
        asked.append(args[-1])
        return made(format_cost=COST) if args[-1] else made()

    monkeypatch.setattr(prove_command, "prove", proved)
    assert main(["prove", "joyai_tiny"]) == 0
    assert "times what one process" not in capsys.readouterr().out
    assert main(["prove", "joyai_tiny", "--precision", "recipe"]) == 0
    assert "2 times what one process in this precision is away from itself in fp32" in capsys.readouterr().out
    assert asked == [False, True]
    assert main(["prove", "joyai_tiny", "--precision", "fp64"]) == 2
