"""The planned time of an update, worked out by hand for flows and for a whole small update."""

from dataclasses import replace

import pytest

from megatron_joy.parallel import flops
from megatron_joy.parallel.communication import Flow
from megatron_joy.parallel.gpus import GPUS, Gpu
from megatron_joy.parallel.steptime import (
    Assumptions,
    distinct_stages,
    flow_seconds,
    optimizer_seconds,
    stage_flops,
    step_time,
    update_time,
)
from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.schema import Recipe

GPU = Gpu(80e9, 1e15, "made up", (), hbm=1e12, link=400e9, network=50e9)


def sent(pattern: str, ranks: int, stride: int, size: float = 400e9) -> float:
    return flow_seconds(Flow("data", "x", pattern, ranks, stride, size), GPU, 1.0)  # type: ignore[arg-type]


def test_a_flow_takes_the_narrowest_link_on_its_way() -> None:
    assert sent("ring", 8, 1) == 1.0  # inside the node
    assert sent("ring", 16, 1) == 1.0  # eight cards of 50 GB/s are as wide
    assert sent("ring", 16, 2) == 2.0  # four members in the node: four cards
    assert sent("ring", 4, 8) == 8.0  # one member in each node
    assert sent("send", 2, 4) == 1.0
    assert sent("send", 2, 64) == 8.0
    # Of 15 others 8 are in the other node: 8/15 through one card.
    assert sent("pairs", 16, 1) == pytest.approx(8.0 * 8 / 15)
    assert sent("pairs", 8, 1) == 1.0
    assert flow_seconds(Flow("data", "x", "ring", 8, 1, 400e9), GPU, 0.5) == 2.0


def paper(*overrides: str) -> Recipe:
    return load_recipe("joyai_48b_a3b", ["layout.data_parallel_size=64", *overrides])


def test_flops_of_the_stages_are_those_of_the_model() -> None:
    for layout in ("2", "4"):
        recipe = paper(f"layout.pipeline_model_parallel_size={layout}", "train.recompute=none")
        stages = [stage_flops(recipe, stage, 2048.5) for stage in range(int(layout))]
        assert sum(trained for trained, _ in stages) == pytest.approx(flops.per_token(recipe, 2048.5), rel=1e-12)
        assert {again for _, again in stages} == {0.0}
    forward = stage_flops(paper("train.recompute=full"), 0, 2048.5)
    assert forward[1] == pytest.approx(forward[0] / flops.TRAINING, rel=1e-12)  # stage 0 has no head


def test_an_update_is_the_sum_of_its_parts() -> None:
    recipe = paper("train.recompute=none")
    assumed = Assumptions(kernels=0.5, links=1.0)
    found = step_time(recipe, GPU, assumed)
    # The last of two stages has the head and the MTP layer: it sets the pace, the other one waits one micro-batch.
    trained, _ = stage_flops(recipe, 1, 2048.5)
    assert found.products == pytest.approx(trained * 144 * 4096 / (1e15 * 0.5))
    assert found.expert == pytest.approx(7 / 8 * 20 * 144 * 4096 * 8 * (4 * 2048 * 2 + 8) / 400e9)
    assert found.pipeline == pytest.approx(144 * 4096 * 2048 * 2 / 50e9)
    passes = found.products + found.expert + found.pipeline
    assert found.bubble == pytest.approx(passes / 144)
    assert found.seconds == pytest.approx(passes + found.bubble + found.data + found.optimizer)
    assert found.model_flops == pytest.approx(flops.per_token(recipe, 2048.5) * 9216 * 4096)
    assert found.mfu(GPU, 128) == pytest.approx(found.model_flops / (found.seconds * 1e15 * 128))
    hidden = step_time(recipe, GPU, replace(assumed, overlap=1.0))
    assert hidden.seconds == pytest.approx(found.products * (1 + 1 / 144) + found.optimizer)


def test_the_optimizer_moves_its_states_and_muon_multiplies_too() -> None:
    tiny = load_recipe("joyai_tiny", ["layout.data_parallel_size=1", "layout.expert_model_parallel_size=1"])
    numel = optimizer_seconds(tiny, 0, GPU, Assumptions()) * 1e12
    from megatron_joy.parallel.tensors import chunk_tensors

    values = sum(tensor.numel for tensor in chunk_tensors(tiny, 0))
    width = {"fp32": 4, "bf16": 2}[tiny.precision.params_dtype]
    assert numel == pytest.approx(values * (4 + 2 * 12 + width))
    with_products = [optimizer_seconds(paper(), 0, gpu, Assumptions()) for gpu in (GPU, replace(GPU, bf16=1e30))]
    assert with_products[0] > with_products[1] > 0
    assert update_time(paper(), GPU, Assumptions(overlap=1.0)).data == 0


def test_stages_that_are_alike_are_looked_at_once() -> None:
    recipe = paper("layout.pipeline_model_parallel_size=8")
    assert distinct_stages(recipe) == [0, 1, 7]
    assert all(gpu.link > gpu.network and gpu.hbm > gpu.link for gpu in GPUS.values())
