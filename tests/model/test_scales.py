"""Delayed scales of a model: shared by the ranks that Transformer Engine shares them with, moved on where it does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_joy.model import scales as scales_module
from megatron_joy.model.backends.emulated import emulated_blocks
from megatron_joy.model.backends.select import emulation_of
from megatron_joy.model.build import build_model
from megatron_joy.model.config import transformer_config
from megatron_joy.model.scales import BACKWARD, FORWARD, ScaleKeeper, states_of
from megatron_joy.platform import process as platform
from megatron_joy.recipe.schema import Recipe
from megatron_joy.train.step import Trainer
from tests.gloo import run_world
from tests.model.small import batch, row, small_recipe
from tests.model.test_fp8 import recipe_with, whole_inputs

PASSES = 3


def delayed(**fp8: Any) -> Recipe:
    keys = {"recipe": "delayed", "format": "hybrid", "amax_history_len": 2, "emulate": True}
    return recipe_with(**keys | fp8)


def two_linears(layout: dict[str, Any]) -> tuple[list[Tensor], list[float]]:
    """Column then row linear, three micro-batches of growing size: the last output and gradients, then all scales."""
    recipe = delayed().model_copy(update={"layout": small_recipe(layout=layout).layout})
    process = platform.start(recipe.layout, recipe.seed)
    config, blocks = transformer_config(recipe), emulated_blocks(emulation_of(recipe.precision.fp8))
    common: dict[str, Any] = {"config": config, "init_method": lambda w: w, "bias": False, "is_expert": False}
    column = blocks.column_linear(256, 512, gather_output=False, skip_bias_add=True, **common)
    row = blocks.row_linear(512, 256, input_is_parallel=True, skip_bias_add=True, **common)
    keeper = ScaleKeeper(recipe, process.groups, [torch.nn.ModuleList([column, row])])
    x, first, second, weights = whole_inputs()
    size, rank = process.groups.tp.size(), process.groups.tp.rank()
    column.weight.data.copy_(first.chunk(size, 0)[rank])
    row.weight.data.copy_(second.chunk(size, 1)[rank])
    for i in range(PASSES):
        mine = (x.chunk(size, 0)[rank] * 10**i).clone().requires_grad_()
        column.weight.grad = row.weight.grad = None
        out = row(column(mine)[0])[0]
        keeper.move_on(FORWARD)
        (out * weights.chunk(size, 0)[rank] * 100**i).sum().backward()
        keeper.move_on(BACKWARD)
    assert mine.grad is not None
    states = [s for p in states_of(torch.nn.ModuleList([column, row])) for s in p.by_direction.values()]
    return [out.detach(), mine.grad, column.weight.grad, row.weight.grad], torch.cat([s.scale for s in states]).tolist()


def test_two_tensor_parallel_ranks_have_the_scales_of_one_process_and_compute_the_same() -> None:
    ((whole, scales),) = run_world(two_linears, 1, {})
    ranks = run_world(two_linears, 2, {"tensor_model_parallel_size": 2})
    assert [own for _, own in ranks] == [scales] * 2
    assert len(set(scales)) > 5  # inputs, weights and gradients of both have moved on
    joined = [
        torch.cat(part, axis) for part, axis in zip(zip(*(r for r, _ in ranks), strict=True), (0, 0, 0, 1), strict=True)
    ]
    for ours, wanted in zip(joined, whole, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=float(wanted.abs().max()) * 1e-5)


def rows_with_amaxes(trainer: Trainer, direction: str, ending: str) -> list[int]:
    """Which rows of the history have an amax, of the product whose module's name ends so."""
    module = next(m for name, m in trainer.models[0].named_modules() if name.endswith(ending))
    (product,) = states_of(module)
    return product.by_direction[direction].amaxes.any(1).nonzero().flatten().tolist()


def test_scales_move_on_where_transformer_engine_s_contexts_begin_and_end_and_only_in_training() -> None:
    """Three contexts a micro-batch (layers, MTP projection, MTP layer), each of which moves all scales on by a row."""
    recipe = delayed(amax_history_len=8)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"global_batch_size": 2})})
    with platform.alone() as process:
        trainer = Trainer(recipe, process, build_model(recipe, process))
        batches = [batch([row([20, 13], seed)]) for seed in (1, 2)]
        trainer.step(1, batches)
        attention, mtp = "decoder.layers.0.self_attention.linear_q_down_proj", "mtp_model_layer.layers.0.self_attention"
        places = [attention, "eh_proj", f"{mtp}.linear_q_down_proj"]
        # Six moves: what was seen before the first is in row 2, before the last in row 7.
        assert [rows_with_amaxes(trainer, FORWARD, place) for place in places] == [[2, 5], [3, 6], [4, 7]]
        assert [rows_with_amaxes(trainer, BACKWARD, place) for place in places] == [[4, 7], [3, 6], [2, 5]]
        before = trainer.scales.copies()
        trainer.evaluate(batches)
        trainer.compute_alone(batches)
        trainer.tell = lambda moment, *_: setattr(trainer, "refused", "a test")
        assert not trainer.step(2, batches).made
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.scales.copies(), strict=True))
        trainer.tell = lambda *_: None
        assert trainer.step(2, batches).made
        assert not all(torch.equal(a, b) for a, b in zip(before, trainer.scales.copies(), strict=True))


class EngineLinear(torch.nn.Module):
    """What is looked at of a module of Transformer Engine (2.20, module/base.py)."""

    def __init__(self, gemms: int) -> None:
        super().__init__()
        self.num_gemms, self.fp8_meta = gemms, dict[str, Any]()
        for i in range(gemms):
            self.register_parameter(f"weight{i}", torch.nn.Parameter(torch.zeros(2, 2)))

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        for direction, kinds in (("fwd", 3), ("bwd", 2)):
            columns = self.fp8_meta["num_gemms"] * kinds
            state = SimpleNamespace(scale=torch.ones(columns), amax_history=torch.zeros(recipe.length, columns))
            self.fp8_meta[f"scaling_{direction}"] = state


def test_transformer_engine_s_state_is_found_kept_and_not_moved_on_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales_module, "get_fp8_recipe", lambda config: SimpleNamespace(length=4))
    chunk, outside = torch.nn.ModuleList([EngineLinear(3)]), EngineLinear(1)
    chunk.append(outside)
    outside.outside_fp8 = True  # type: ignore[assignment]
    chunk.config = None  # type: ignore[assignment]
    keeper = ScaleKeeper(delayed(emulate=False), SimpleNamespace(tp_dp_cp=None), [chunk])  # type: ignore[arg-type]
    (product,) = states_of(chunk)
    assert product.weight is chunk[0].weight0 and product.experts == 3
    assert {d: tuple(s.amaxes.shape) for d, s in product.by_direction.items()} == {FORWARD: (4, 9), BACKWARD: (4, 6)}
    keeper.move_on(FORWARD)
    with keeper.kept():
        chunk[0].fp8_meta["scaling_bwd"].amax_history[0] = 7.0  # type: ignore[index]
    assert not product.by_direction[BACKWARD].amaxes.any()
