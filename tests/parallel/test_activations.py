"""Saved activations are planned within a tenth of what autograd keeps, and FLOPs as torch counts them."""

import pytest

from megatron_joy.parallel import flops
from megatron_joy.parallel.activations import chunk_saved
from tests.gloo import run_world
from tests.model.small import LENGTH
from tests.parallel.worlds import counted_flops, saved_by_one_pass, uneven_recipe


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_are_within_a_tenth_of_the_tensors_saved(recompute: str, dtype: str) -> None:
    recipe = uneven_recipe({}, dtype, recompute=recompute, micro_batch_size=2)
    (saved,) = run_world(saved_by_one_pass, 1, recipe)
    assert chunk_saved(recipe, 0, fused_norms=False) == pytest.approx(saved, rel=0.1)


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
