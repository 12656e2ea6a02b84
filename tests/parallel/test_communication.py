"""Bytes that a rank is planned to send are those that it hands to gloo in a real step."""

import pytest

from megatron_joy.parallel.communication import Flow, by_kind, pass_flows, stage_flows
from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.schema import Recipe
from tests.gloo import run_world
from tests.parallel.test_states import CP, DP, EP, ETP, PP, TP, VPP, name_of
from tests.parallel.traffic import sent_in_a_step
from tests.parallel.worlds import uneven_recipe

CASES: list[tuple[dict[str, int], str, str]] = [
    ({TP: 2}, "adamw", "none"),
    ({DP: 2, EP: 2}, "adamw", "full"),
    ({DP: 2, EP: 2}, "muon", "none"),
    ({PP: 2}, "adamw", "none"),
    ({CP: 2}, "adamw", "none"),
    ({TP: 2, ETP: 2}, "adamw", "none"),
    ({TP: 2, EP: 2}, "adamw", "none"),
    ({TP: 2, ETP: 2}, "muon", "none"),
    ({PP: 2, VPP: 2}, "adamw", "none"),
    ({CP: 2, EP: 2}, "adamw", "none"),
    ({PP: 2, EP: 2, DP: 2}, "adamw", "none"),
]


@pytest.mark.parametrize(("layout", "optimizer", "recompute"), CASES, ids=name_of)
def test_a_step_sends_what_is_planned(layout: dict[str, int], optimizer: str, recompute: str) -> None:
    recipe = uneven_recipe(layout, "fp32", optimizer, recompute=recompute, micro_batch_size=2)
    world, stages = recipe.layout.world_size, recipe.layout.pipeline_model_parallel_size
    counted = run_world(sent_in_a_step, world, recipe)
    planned = [by_kind(stage_flows(recipe, rank * stages // world)) for rank in range(world)]
    assert {kind for found in counted for kind in found} == {kind for plan in planned for kind in plan}
    for kind in planned[0]:
        # Which ranks tokens go to is the routers' choice; what all ranks send together is not.
        assert sum(found[kind] for found in counted) == sum(plan[kind] for plan in planned)
        if kind != "expert":
            assert [found[kind] for found in counted] == [plan[kind] for plan in planned]


def paper(*overrides: str) -> Recipe:
    return load_recipe("joyai_48b_a3b", ["layout.data_parallel_size=64", *overrides])


def flow(recipe: Recipe, stage: int, what: str) -> Flow:
    (found,) = [flow for flow in stage_flows(recipe, stage) if flow.what == what]
    return found


def test_the_papers_layout_sends_what_is_worked_out_by_hand() -> None:
    recipe = paper("train.recompute=none")
    # 9,216 rows of 4,096 tokens over 64 replicas: 144 micro-batches. Stage 0 has 19 MoE layers of 20; 8 experts a
    # token, 2,048 wide, bf16; there and back, in both passes; the choice's weights in fp32 there and their gradient.
    tokens = 144 * 4096
    dispatched = flow(recipe, 0, "dispatched tokens")
    assert (dispatched.ranks, dispatched.stride, dispatched.pattern) == (8, 1, "pairs")
    assert dispatched.sent == 7 / 8 * 19 * tokens * 8 * (4 * 2048 * 2 + 2 * 4)
    again = flow(paper("train.recompute=full"), 0, "dispatched tokens")
    assert again.sent == 7 / 8 * 19 * tokens * 8 * (6 * 2048 * 2 + 3 * 4)
    stream = flow(recipe, 1, "residual stream")
    assert (stream.stride, stream.sent) == (64, tokens * 2048 * 2)
    assert flow(recipe, 1, "gradients of the shared embedding").sent == 129_280 * 2048 * 4


def test_degrees_of_one_send_nothing() -> None:
    alone = load_recipe("joyai_tiny", ["layout.data_parallel_size=1", "layout.expert_model_parallel_size=1"])
    assert stage_flows(alone, 0) == []
    assert pass_flows(paper(), 0) == [flow for flow in stage_flows(paper(), 0) if not flow.once]
