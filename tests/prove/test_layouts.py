"""Every layout of the stack follows one process over ten steps in fp32, from one checkpoint resharded into it."""

import pytest

from megatron_joy.prove.proof import STEPS_BEFORE, hold_against, prove
from megatron_joy.prove.shrink import Shrunk, shrink
from megatron_joy.recipe import load_recipe
from tests.prove.conftest import AloneOf

LAYOUTS: dict[str, dict[str, int]] = {
    "DP2 (ZeRO-1)": {"data_parallel_size": 2},
    "TP2 (SP)": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 x VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "EP2": {"expert_model_parallel_size": 2, "data_parallel_size": 2},
    "TP2 x EP2 (ETP1)": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "TP2 x ETP2": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "CP2 x EP2": {"context_parallel_size": 2, "expert_model_parallel_size": 2},
    "PP2 x EP2": {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2, "data_parallel_size": 2},
    "CP2 x TP2": {"context_parallel_size": 2, "tensor_model_parallel_size": 2},
    # Experts both spread and split: the two halves of an expert get different numbers of tokens from each other.
    "DP2 x TP2 x EP2 x ETP2": {
        "data_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
    },
}
# Gloo makes tensor parallelism slow, and four processes share few cores.
SLOW = {"TP2 (SP)", "TP2 x EP2 (ETP1)", "TP2 x ETP2", "PP2 x EP2", "CP2 x TP2", "DP2 x TP2 x EP2 x ETP2"}
ONE = {"expert_model_parallel_size": 1, "data_parallel_size": 1}


def small(name: str) -> Shrunk:
    overrides = [f"layout.{key}={value}" for key, value in (ONE | LAYOUTS[name]).items()]
    return shrink(load_recipe("joyai_tiny", overrides), 4, STEPS_BEFORE + 10)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in LAYOUTS])
def test_layout_follows_one_process(name: str, alone_of: AloneOf) -> None:
    layout = small(name)
    proof = hold_against(alone_of(layout), layout)
    assert proof.shrunk.reduced == ()
    assert len(proof.layout) == 10
    assert proof.equal_loads
    assert proof.holds, (proof.differences, proof.worst, proof.routing)
    # Tighter than the verdict: what these layouts reach, so that a loss of accuracy shows (docs/parallelism.md).
    assert max(proof.differences.values()) < 2e-6


def test_a_layout_of_another_recipe_is_not_held_against_this_one(alone_of: AloneOf) -> None:
    other = shrink(load_recipe("joyai_tiny", ["schedule.peak_lr=2e-3"]), 2, STEPS_BEFORE + 10)
    with pytest.raises(ValueError, match="another recipe"):
        hold_against(alone_of(small("PP2")), other)


def test_muon_follows_one_process_as_closely() -> None:
    """Whole matrices are gathered over TP, shared out over DP and their momentum is resharded."""
    degrees = ONE | {"data_parallel_size": 2, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}
    overrides = [f"layout.{key}={value}" for key, value in degrees.items()]
    proof = prove(load_recipe("joyai_tiny", ["optimizer.name=muon", *overrides]), processes=4, steps=4)
    assert proof.shrunk.recipe.optimizer.name == "muon" and proof.shrunk.reduced == ()
    assert proof.holds, (proof.differences, proof.worst, proof.routing)
    assert max(proof.differences.values()) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_activations_changes_nothing(recompute: str) -> None:
    """The reference keeps its activations; experts must not count recomputed tokens twice."""
    proof = prove(load_recipe("joyai_tiny", [f"train.recompute={recompute}"]), processes=2, steps=3)
    assert proof.shrunk.recipe.train.recompute == recompute
    assert proof.holds, (proof.differences, proof.worst, proof.routing)
