"""Balance of experts: the sequence-wise loss by its written-out equation in every layout, no token dropped, alarms."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_joy.model.build import build_model
from megatron_joy.model.places import token_places
from megatron_joy.platform import process as platform
from megatron_joy.train.forward import local_batch
from megatron_joy.train.step import Trainer
from tests.gloo import run_world
from tests.model import naive
from tests.model.small import EOD, LENGTH, ROWS, batch, small_recipe
from tests.model.test_definition import disturb, weights_of

FACTOR = 3.0  # large, so that it shows in gradients
LAYOUTS: dict[str, dict[str, int]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "EP2": {"expert_model_parallel_size": 2, "data_parallel_size": 2},
}


@pytest.fixture
def alone() -> Iterator[platform.Process]:
    with platform.alone() as process:
        yield process


def written_out(scores: list[list[Tensor]], top: int, experts: int) -> Tensor:
    """Equations 17 to 20 of arXiv 2412.19437, a token and an expert at a time; scores of rows, of layers, [T, E]."""
    total = torch.zeros(())
    for row in scores:
        for layer in row:
            tokens = layer.shape[0]
            for i in range(experts):
                picked = sum(int(i in token.topk(top).indices.tolist()) for token in layer.detach())
                f = experts / (top * tokens) * picked
                p = sum(token[i] / token.sum() for token in layer) / tokens
                total = total + FACTOR * f * p
    return total / len(scores)


def test_the_loss_and_its_gradients_are_those_of_the_equations(
    alone: platform.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(model={"sequence_balance_factor": FACTOR}, train={"micro_batch_size": 2})
    (model,) = build_model(recipe, alone)
    disturb(model)
    weights = weights_of(model)
    trainer = Trainer(recipe, alone, [model])
    result = trainer.step(1, [batch(ROWS[:2]), batch(ROWS[2:])])

    seen: list[Tensor] = []  # of every document, layer by layer

    def noting(x: Tensor, weight: Tensor, *rest: Any) -> Any:
        seen.append(torch.sigmoid(x @ weight.T))
        return route(x, weight, *rest)

    route = naive.route
    monkeypatch.setattr(naive, "route", noting)
    objective = naive.objective(ROWS, weights, recipe.model, EOD)
    layers = recipe.model.num_hidden_layers - recipe.model.first_k_dense_replace
    of_layer = [torch.cat(seen[layer::layers]).split(LENGTH) for layer in range(layers)]
    loss = written_out([list(row) for row in zip(*of_layer, strict=True)], 2, recipe.model.n_routed_experts)
    (objective.total(recipe.model.mtp_loss_factor) + loss).backward()

    assert result.balance_loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert result.loss == pytest.approx(float(objective.main_sum.detach() / objective.main_targets), rel=2e-6)
    for name, parameter in model.named_parameters():
        gradient = weights[name].grad
        assert gradient is not None, name
        difference = (parameter.main_grad - gradient).abs().max() / gradient.abs().max()
        assert difference < 1e-5, f"{name}: {difference:.1e}"


def _step(layout: dict[str, int], factor: float) -> tuple[float | None, float]:
    recipe = small_recipe(layout, {"sequence_balance_factor": factor}, {"micro_batch_size": 2})
    process = platform.start(recipe.layout, recipe.seed)
    trainer = Trainer(recipe, process, build_model(recipe, process))
    mine = ROWS[2 * process.groups.dp.rank() :][:2] if recipe.layout.data_parallel_size == 2 else ROWS
    result = trainer.step(1, [batch(mine[i : i + 2]) for i in range(0, len(mine), 2)])
    return result.balance_loss, result.grad_norm


@pytest.fixture(scope="module")
def one() -> tuple[float, float]:
    loss, norm = run_world(_step, 1, {}, FACTOR)[0]
    assert loss > 1.01 * 3 * FACTOR  # an even load's loss is alpha in each of three layers, and none is lower
    assert norm != pytest.approx(run_world(_step, 1, {}, 0.0)[0][1], rel=1e-3)
    return loss, norm


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_have_the_loss_and_gradients_of_one_process(name: str, one: tuple[float, float]) -> None:
    for loss, norm in run_world(_step, 2, LAYOUTS[name], FACTOR):
        assert loss == pytest.approx(one[0], rel=1e-6)
        assert norm == pytest.approx(one[1], rel=1e-5)


def _places(layout: dict[str, int]) -> bool:
    """Whether tokens that are numbered lie on this rank where `token_places` says."""
    process = platform.start(small_recipe(layout).layout, 1)
    rows = batch(ROWS)
    numbered = torch.arange(rows.tokens.numel()).view_as(rows.tokens)
    rows.tokens.copy_(numbered)
    inside = local_batch(rows, process).tokens.t()  # [s, b] as embedded, before TP ranks share it out
    tp = process.groups.tp
    return torch.equal(token_places(len(ROWS), LENGTH, process.groups), inside.chunk(tp.size())[tp.rank()])


def test_places_are_where_the_tokens_of_a_batch_go() -> None:
    both = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
    assert run_world(_places, 4, both) == [True] * 4
    assert run_world(_places, 2, LAYOUTS["TP2"]) == [True] * 2


def test_no_token_is_dropped_when_all_want_the_same_experts(alone: platform.Process) -> None:
    recipe = small_recipe()
    (model,) = build_model(recipe, alone)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer[:2] = 10.0
    weights = weights_of(model)
    result = Trainer(recipe, alone, [model]).step(1, [batch([row]) for row in ROWS])
    assert result.expert_load is not None
    assert torch.equal(result.expert_load, torch.tensor([[0.5, 0.5] + [0.0] * 6] * 3))
    with torch.no_grad():
        expected = naive.objective(ROWS, weights, recipe.model, EOD)  # runs every expert on every token it was given
    assert result.loss == pytest.approx(float(expected.main_sum / expected.main_targets), rel=2e-6)


def test_an_expert_without_tokens_raises_one_alarm_until_it_gets_some() -> None:
    from megatron_joy.train.features.experts import DeadExperts

    told: list[tuple[int, str]] = []
    alarm = DeadExperts(patience=3, first_layer=1)
    busy, idle = [0.5, 0.5, 0.0], [0.4, 0.3, 0.3]
    for step, load in enumerate([busy, busy, busy, busy, busy, idle, busy, busy, busy], start=1):
        loop = SimpleNamespace(tell=lambda moment, text, step=step: told.append((step, f"{moment} {text}")))
        alarm.after_step(loop, SimpleNamespace(expert_load=torch.tensor([idle, load])))  # type: ignore[arg-type]
    message = "on_alarm no token in 3 steps: layer 2 expert 2"
    assert told == [(3, message), (9, message)]
