"""FP8 in the model: which matrices have it, that tensor parallelism changes nothing, and what can't run is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_joy.errors import UserError
from megatron_joy.model import config
from megatron_joy.model.backends.emulated import emulated_blocks
from megatron_joy.model.backends.portable import BLOCKS
from megatron_joy.model.backends.select import blocks_of, fp8_blocks
from megatron_joy.model.build import build_model
from megatron_joy.model.config import transformer_config
from megatron_joy.platform import process as platform
from megatron_joy.precision.emulation import Emulation, fp8_linear
from megatron_joy.recipe.schema import FP8_PARTS, Fp8Section, Recipe
from tests.gloo import run_world
from tests.model.small import small_recipe

BLOCKWISE = Emulation("blockwise", "e4m3")
WIDE: dict[str, Any] = {  # 16 divides every width
    "q_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "moe_intermediate_size": 32,
}
# Part -> how its modules' names end, all of the small model's linears together.
MODULES: dict[str, tuple[str, ...]] = {
    "attention": ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "self_attention.linear_proj"),
    "dense_mlp": ("mlp.linear_fc1", "mlp.linear_fc2"),
    "shared_experts": ("shared_experts.linear_fc1", "shared_experts.linear_fc2"),
    "routed_experts": ("mlp.experts",),
    "mtp_projection": ("eh_proj",),
}


def recipe_with(**fp8: Any) -> Recipe:
    recipe = small_recipe(model=WIDE)
    section = Fp8Section(**{"recipe": "blockwise", "format": "e4m3", "emulate": True} | fp8)
    return recipe.model_copy(update={"precision": recipe.precision.model_copy(update={"fp8": section})})


def emulated_modules(recipe: Recipe) -> set[str]:
    with platform.alone() as process:
        (model,) = build_model(recipe, process)
        return {name for name, module in model.named_modules() if hasattr(module, "emulation")}


@pytest.mark.parametrize("spared", [(), ("attention",), ("routed_experts", "mtp_projection"), ("shared_experts",)])
def test_every_matrix_has_fp8_but_those_named_and_the_head(spared: tuple[str, ...]) -> None:
    found = emulated_modules(recipe_with(high_precision=list(spared)))
    endings = tuple(end for part in FP8_PARTS if part not in spared for end in MODULES[part])
    assert all(name.endswith(endings) for name in found), found
    # Four layers and the MTP layer: five attentions of five matrices, two dense MLPs, three MoE layers, one projection.
    counts = {"attention": 25, "dense_mlp": 4, "shared_experts": 6, "routed_experts": 3, "mtp_projection": 1}
    assert len(found) == sum(count for part, count in counts.items() if part not in spared)


def parallel_mlp() -> tuple[Tensor, ...]:
    """On each of two ranks: column then row linear with sequence parallelism; output, input's gradient, weights'."""
    recipe = small_recipe(layout={"tensor_model_parallel_size": 2})
    platform.start(recipe.layout, recipe.seed)
    blocks, rank = emulated_blocks(BLOCKWISE), torch.distributed.get_rank()
    common: dict[str, Any] = {"init_method": lambda w: w, "bias": False, "is_expert": False}
    common["config"] = transformer_config(recipe)
    column = blocks.column_linear(256, 512, gather_output=False, skip_bias_add=True, **common)
    row = blocks.row_linear(512, 256, input_is_parallel=True, skip_bias_add=True, **common)
    x, first, second, weights = whole_inputs()
    column.weight.data.copy_(first.chunk(2, 0)[rank])
    row.weight.data.copy_(second.chunk(2, 1)[rank])
    mine = x.chunk(2, 0)[rank].clone().requires_grad_()
    out = row(column(mine)[0])[0]
    (out * weights.chunk(2, 0)[rank]).sum().backward()
    return out.detach(), mine.grad, column.weight.grad, row.weight.grad  # type: ignore[return-value]


def whole_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return (
        torch.randn(40, 1, 256, generator=random),
        torch.randn(512, 256, generator=random) / 16,
        torch.randn(256, 512, generator=random) / 16,
        torch.randn(40, 1, 256, generator=random),
    )


def test_two_tensor_parallel_ranks_compute_what_one_does_where_blocks_end_at_their_borders() -> None:
    x, first, second, weights = whole_inputs()
    leaves = [tensor.requires_grad_() for tensor in (x, first, second)]
    out = fp8_linear(fp8_linear(x, first, BLOCKWISE), second, BLOCKWISE)
    (out * weights).sum().backward()
    ranks = run_world(parallel_mlp, 2)
    found = [torch.cat(parts, axis) for parts, axis in zip(zip(*ranks, strict=True), (0, 0, 0, 1), strict=True)]
    for ours, wanted in zip(found, (out.detach(), *(leaf.grad for leaf in leaves)), strict=True):
        assert wanted is not None
        torch.testing.assert_close(ours, wanted, rtol=0, atol=float(wanted.abs().max()) * 1e-5)


def test_without_transformer_engine_fp8_is_refused_with_the_way_out() -> None:
    section = Fp8Section(recipe="blockwise", format="e4m3")
    with pytest.raises(
        UserError, match=r"precision\.fp8\.recipe: \"blockwise\" runs in .* set precision\.fp8\.emulate"
    ):
        fp8_blocks(section, BLOCKS)


@pytest.mark.parametrize(
    ("scaling", "found", "needed"),
    [("mxfp8", (9, 0), "10.0"), ("blockwise", (8, 9), "9.0"), ("delayed", (8, 0), "8.9")],
)
def test_a_gpu_that_cannot_multiply_under_a_scaling_is_one_line(
    scaling: str, found: tuple[int, int], needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found)
    section = Fp8Section(recipe=scaling, format="e4m3")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f'"{scaling}" needs compute capability {needed}, this GPU has {found[0]}'):
        fp8_blocks(section, replace(BLOCKS, name="te"))


def test_transformer_engine_hears_of_delayed_scaling_through_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "transformer_engine_problem", lambda: None)
    keys = {"recipe": "delayed", "format": "hybrid", "amax_history_len": 16, "margin": 1, "emulate": False}
    told = config._fp8(recipe_with(**keys))
    assert told == {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": 16,
        "fp8_amax_compute_algo": "max",
        "fp8_margin": 1,
        "moe_router_padding_for_quantization": True,
    }
    assert set(told) <= set(config.MLATransformerConfig.__dataclass_fields__)


def test_without_fp8_there_are_no_other_blocks() -> None:
    assert blocks_of(small_recipe()) == (BLOCKS, {})
