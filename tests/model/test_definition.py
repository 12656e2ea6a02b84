"""The Megatron-core model against its definition written out in `naive.py`: losses, gradients, routing, biases."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_joy.model.build import build_model
from megatron_joy.platform import process as platform
from megatron_joy.train.step import StepResult, Trainer
from tests.gloo import run_world
from tests.model import naive
from tests.model.small import EOD, ROWS, batch, small_recipe


@pytest.fixture
def alone() -> Iterator[platform.Process]:
    with platform.alone() as process:
        yield process


def disturb(model: Any) -> None:
    """Norms that aren't one and router biases that aren't zero, so that leaving one out shows."""
    random = torch.Generator().manual_seed(5)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("norm.weight"):
            tensor.data.uniform_(0.5, 1.5, generator=random)
        if name.endswith("expert_bias"):
            tensor.uniform_(-0.2, 0.2, generator=random)


def weights_of(model: Any) -> naive.Weights:
    """Copies that collect gradients of their own; buffers too."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    return weights | {name: b.detach().clone() for name, b in model.named_buffers()}


def one_step(process: platform.Process, **train: Any) -> tuple[StepResult, Trainer, naive.Weights]:
    """The first step on ROWS from a disturbed model, and the weights before it."""
    recipe = small_recipe(train=train)
    (model,) = build_model(recipe, process)
    disturb(model)
    weights = weights_of(model)
    trainer = Trainer(recipe, process, [model])
    size = recipe.train.micro_batch_size
    return trainer.step(1, [batch(ROWS[i : i + size]) for i in range(0, len(ROWS), size)]), trainer, weights


def gradient_norm(weights: naive.Weights) -> float:
    return float(torch.stack([w.grad.norm() for w in weights.values() if w.grad is not None]).norm())


def test_losses_and_gradients_are_those_of_the_definition(alone: platform.Process) -> None:
    recipe = small_recipe()
    result, trainer, weights = one_step(alone)
    expected = naive.objective(ROWS, weights, recipe.model, EOD)
    expected.total(recipe.model.mtp_loss_factor).backward()

    assert result.loss_tokens == expected.main_targets
    assert result.loss == pytest.approx(float(expected.main_sum.detach() / expected.main_targets), rel=2e-6)
    assert result.mtp_loss == pytest.approx(float(expected.mtp_sum.detach() / expected.mtp_targets), rel=2e-6)
    assert result.grad_norm == pytest.approx(gradient_norm(weights), rel=1e-5)
    parameters = dict(trainer.chunks[0].module.named_parameters())
    for name, parameter in parameters.items():
        gradient = weights[name].grad
        assert gradient is not None, name
        difference = (parameter.main_grad - gradient).abs().max() / gradient.abs().max()
        assert difference < 5e-6, f"{name}: {difference:.1e}"


def test_loss_without_the_mtp_layer_is_that_of_the_definition(alone: platform.Process) -> None:
    recipe = small_recipe(model={"num_nextn_predict_layers": 0})
    (model,) = build_model(recipe, alone)
    weights = weights_of(model)
    result = Trainer(recipe, alone, [model]).step(1, [batch([r]) for r in ROWS])
    documents = [d for r in ROWS for d in naive.split_documents(r[:-1], EOD)]
    assert result.mtp_loss is None
    assert not [name for name in weights if name.startswith("mtp")]
    counts = torch.stack([naive.read(d, weights, recipe.model).counts for d in documents]).sum(0)
    assert result.expert_load is not None
    assert torch.equal(result.expert_load, counts / counts.sum(-1, keepdim=True))


def test_expert_bias_moves_by_gamma_towards_the_mean_of_the_global_batch(alone: platform.Process) -> None:
    recipe = small_recipe()
    _, trainer, before = one_step(alone)
    with torch.no_grad():
        counts = naive.objective(ROWS, before, recipe.model, EOD).counts  # [moe layers, experts]
    model = trainer.chunks[0].module
    for layer, load in zip((3, 5, 7), counts, strict=True):
        name = f"decoder.layers.{layer}.mlp.router.expert_bias"
        step = recipe.model.router_bias_update_rate * torch.sign(load.float().mean() - load)
        assert torch.equal(dict(model.named_buffers())[name], before[name] + step)


def test_micro_batches_with_different_numbers_of_targets_weigh_their_targets(alone: platform.Process) -> None:
    four, _, _ = one_step(alone, micro_batch_size=1)
    one, _, _ = one_step(alone, micro_batch_size=4)
    assert four.loss_tokens == one.loss_tokens
    for name in ("loss", "mtp_loss", "grad_norm"):
        assert getattr(four, name) == pytest.approx(getattr(one, name), rel=1e-6), name


def biases_of_this_rank(layout: dict[str, int]) -> dict[str, Tensor]:
    recipe = small_recipe(layout=layout)
    process = platform.start(recipe.layout, recipe.seed)
    chunks = build_model(recipe, process)
    trainer = Trainer(recipe, process, chunks)
    dp = process.groups.dp
    trainer.step(1, [batch([ROWS[i]]) for i in range(dp.rank(), len(ROWS), dp.size())])
    biases = {n: b.numpy() for chunk in chunks for n, b in chunk.named_buffers() if n.endswith("expert_bias")}
    platform.stop()
    return biases


def test_expert_bias_of_every_data_parallel_rank_follows_the_global_batch(alone: platform.Process) -> None:
    recipe = small_recipe()
    (model,) = build_model(recipe, alone)
    with torch.no_grad():
        counts = naive.objective(ROWS, weights_of(model), recipe.model, EOD).counts
    expected = recipe.model.router_bias_update_rate * torch.sign(counts.float().mean(-1, keepdim=True) - counts)
    for rank in run_world(biases_of_this_rank, 2, {"data_parallel_size": 2, "expert_model_parallel_size": 2}):
        for layer, bias in zip((3, 5, 7), expected, strict=True):
            assert torch.equal(torch.from_numpy(rank[f"decoder.layers.{layer}.mlp.router.expert_bias"]), bias)


def test_router_selects_with_the_bias_and_weighs_without_it(alone: platform.Process) -> None:
    recipe = small_recipe()
    (model,) = build_model(recipe, alone)
    router = model.decoder.layers[3].mlp.router
    random = torch.Generator().manual_seed(3)
    router.expert_bias.uniform_(-0.3, 0.3, generator=random)
    hidden = torch.randn(40, 1, recipe.model.hidden_size, generator=random)  # [s, b, h]
    weights, chosen = router(hidden)  # [s * b, experts] each
    experts, scales = naive.route(hidden[:, 0], router.weight, router.expert_bias, recipe.model)
    expected = torch.zeros(40, recipe.model.n_routed_experts).scatter(1, experts, scales)
    assert torch.equal(chosen, expected != 0)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)
    unbiased, _ = naive.route(hidden[:, 0], router.weight, torch.zeros(8), recipe.model)
    assert not torch.equal(experts.sort().values, unbiased.sort().values)  # the bias did decide something
    assert weights.sum(-1).tolist() == pytest.approx([recipe.model.routed_scaling_factor] * 40)
