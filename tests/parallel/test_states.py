"""Bytes of parameters, gradients and optimizer state are what the ranks allocate, to the byte."""

from dataclasses import asdict
from typing import Any

import pytest

from megatron_joy.parallel.states import rank_states, stage_states
from megatron_joy.parallel.tensors import chunk_tensors, chunks_of_stage
from megatron_joy.recipe import load_recipe
from tests.gloo import run_world
from tests.parallel.worlds import allocated, uneven_recipe

TP, PP, VPP, CP, DP = (
    f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "context", "data")
)
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"

LAYOUTS: list[tuple[dict[str, int], str]] = [
    ({}, "bf16"),
    ({DP: 2}, "fp32"),
    ({DP: 2, EP: 2}, "bf16"),
    ({TP: 2}, "bf16"),
    ({CP: 2, EP: 2}, "fp32"),
    ({PP: 2, VPP: 2}, "bf16"),
    ({PP: 2, EP: 2, DP: 2}, "bf16"),
    ({TP: 2, DP: 2, EP: 2, ETP: 2}, "bf16"),
]


MOMENTS_IN_BF16 = ({DP: 2}, {DP: 2, EP: 2})

MUON: list[tuple[dict[str, int], str]] = [
    ({DP: 2}, "fp32"),
    ({DP: 2, EP: 2}, "bf16"),
    ({TP: 2, DP: 2, EP: 2, ETP: 2}, "bf16"),
]


def name_of(case: Any) -> str:
    return (
        "-".join(f"{key.split('_parallel')[0]}{value}" for key, value in case.items())
        if isinstance(case, dict)
        else case
    )


@pytest.mark.parametrize(
    ("layout", "dtype", "optimizer"),
    [(*case, "adamw") for case in LAYOUTS] + [(*case, "muon") for case in MUON],
    ids=name_of,
)
def test_every_rank_allocates_what_is_planned(layout: dict[str, int], dtype: str, optimizer: str) -> None:
    recipe = uneven_recipe(layout, dtype, optimizer)
    if layout in MOMENTS_IN_BF16 and optimizer == "adamw":
        recipe = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"moments_dtype": "bf16"})})
    world = recipe.layout.world_size
    for rank, found in enumerate(run_world(allocated, world, recipe)):
        named = found.pop("named")
        stage = rank * recipe.layout.pipeline_model_parallel_size // world
        planned = [chunk_tensors(recipe, chunk) for chunk in chunks_of_stage(recipe, stage)]
        assert named == [[(t.name, t.shape, t.expert) for t in tensors] for tensors in planned]
        assert asdict(rank_states(recipe, rank)) == found
        assert rank_states(recipe, rank).total <= stage_states(recipe, stage).total


def test_the_48b_has_its_parameters() -> None:
    recipe = load_recipe(
        "joyai_48b_a3b", ["layout.pipeline_model_parallel_size=1", "layout.expert_model_parallel_size=1"]
    )
    numel = sum(tensor.numel for tensor in chunk_tensors(recipe, 0))
    # docs/glossary.md and facts: 49,021,329,152 with the MTP layer, of which the router biases are buffers.
    assert numel == 49_021_329_152 - 39 * 256
