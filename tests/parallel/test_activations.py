"""Saved activations are planned within a tenth of what autograd keeps, and FLOPs as torch counts them."""

import pytest

from megatron_joy.parallel import flops
from megatron_joy.parallel.activations import chunk_saved
from megatron_joy.parallel.tensors import chunks_of_stage
from tests.gloo import run_world
from tests.model.small import LENGTH
from tests.parallel.test_states import CP, DP, EP, ETP, PP, TP, VPP, name_of
from tests.parallel.worlds import counted_flops, saved_by_one_pass, uneven_recipe


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_are_within_a_tenth_of_the_tensors_saved(recompute: str, dtype: str) -> None:
    recipe = uneven_recipe({}, dtype, recompute=recompute, micro_batch_size=2)
    ((saved,),) = run_world(saved_by_one_pass, 1, recipe)
    assert chunk_saved(recipe, 0, fused_norms=False) == pytest.approx(saved, rel=0.1)


LAYOUTS: list[tuple[dict[str, int], str, str]] = [
    ({TP: 2}, "none", "bf16"),
    ({TP: 2, EP: 2}, "selective", "fp32"),
    ({TP: 2, ETP: 2}, "none", "fp32"),
    ({CP: 2}, "none", "bf16"),
    ({CP: 2, EP: 2}, "selective", "fp32"),
    ({DP: 2, EP: 2}, "none", "bf16"),
    ({PP: 2}, "none", "bf16"),
    ({PP: 2, VPP: 2}, "full", "fp32"),
]


@pytest.mark.parametrize(("layout", "recompute", "dtype"), LAYOUTS, ids=name_of)
def test_activations_of_a_layout_are_within_a_tenth_too(layout: dict[str, int], recompute: str, dtype: str) -> None:
    recipe = uneven_recipe(layout, dtype, recompute=recompute, micro_batch_size=2)
    saved = run_world(saved_by_one_pass, 2, recipe)
    for stage in range(recipe.layout.pipeline_model_parallel_size):
        # Which of a stage's ranks gets which tokens is the routers' choice; their mean is what is planned.
        ranks = saved if recipe.layout.pipeline_model_parallel_size == 1 else [saved[stage]]
        for number, chunk in enumerate(chunks_of_stage(recipe, stage)):
            mean = sum(rank[number] for rank in ranks) / len(ranks)
            assert chunk_saved(recipe, chunk, fused_norms=False) == pytest.approx(mean, rel=0.1)


def test_flops_of_a_token_are_what_torch_counts() -> None:
    """Torch counts attention as a full square of the padded value width (so values get the width of queries here), and
    grouped products not at all: they are added by hand.
    """
    recipe = uneven_recipe({})
    wide = recipe.model.qk_nope_head_dim + recipe.model.qk_rope_head_dim
    model = recipe.model.model_copy(update={"v_head_dim": wide})
    recipe = recipe.model_copy(update={"model": model})
    (counted,) = run_world(counted_flops, 1, recipe)
    grouped = 3 * 3 * 6 * model.num_experts_per_tok * model.hidden_size * model.moe_intermediate_size * LENGTH
    assert flops.per_token(recipe, keys=LENGTH) * LENGTH == counted + grouped
