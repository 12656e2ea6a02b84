"""What a stage changes in a model that is there: exactly what building it so would have given, and nothing else."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from megatron_joy.model.build import build_model
from megatron_joy.optim.build import parts
from megatron_joy.platform import process as platform
from megatron_joy.recipe.timetable import Stage
from megatron_joy.train.step import Trainer
from tests.model.small import ROWS, batch, small_recipe


@pytest.fixture
def alone() -> Iterator[platform.Process]:
    with platform.alone() as process:
        yield process


def made(process: platform.Process, **model: float) -> tuple[Trainer, Stage]:
    recipe = small_recipe(model=model)
    trainer = Trainer(recipe, process, build_model(recipe, process))
    return trainer, trainer.timetable.stages[0]


def loss(trainer: Trainer) -> float:
    return trainer.evaluate([batch(ROWS)]).main


def test_a_new_rotary_base_gives_the_losses_of_a_model_built_with_it(alone: platform.Process) -> None:
    trainer, stage = made(alone)
    before = loss(trainer)
    trainer.enter(replace(stage, rope_theta=50_000.0))
    assert loss(trainer) == loss(made(alone, rope_theta=50_000.0)[0]) != before
    trainer.enter(stage)
    assert loss(trainer) == before


def test_without_mtp_the_main_loss_is_the_same_and_the_layer_gets_no_gradient(alone: platform.Process) -> None:
    trainer, stage = made(alone)
    other, _ = made(alone)
    trainer.enter(replace(stage, mtp_loss_factor=0.0))
    ours, theirs = trainer.step(1, [batch(ROWS)]), other.step(1, [batch(ROWS)])
    assert ours.loss == theirs.loss
    assert ours.mtp_loss is None and theirs.mtp_loss is not None
    assert ours.grad_norm < theirs.grad_norm
    trainer.enter(stage)
    assert trainer.step(2, [batch(ROWS)]).mtp_loss == pytest.approx(theirs.mtp_loss, rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_mtp_layer_that_is_left_out_keeps_every_bit(alone: platform.Process, optimizer: str) -> None:
    recipe = small_recipe()
    recipe = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"name": optimizer})})
    trainer = Trainer(recipe, alone, build_model(recipe, alone))
    (model,) = trainer.models

    def moved(number: int) -> set[bool]:
        """Whether each tensor of (MTP, the rest) changed in a step."""
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer.step(number, [batch(ROWS)])
        changed = {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}
        assert all(change for name, change in changed.items() if not name.startswith("mtp."))
        return {change for name, change in changed.items() if name.startswith("mtp.")}

    stage = trainer.timetable.stages[0]
    trainer.enter(replace(stage, mtp_loss_factor=0.0))
    assert moved(1) == moved(2) == {False}
    trainer.enter(stage)
    assert moved(3) == {True}
    trainer.enter(replace(stage, mtp_loss_factor=0.0))  # there is momentum now
    assert moved(4) == moved(5) == {False}
    trainer.enter(stage)
    assert moved(6) == {True}


def test_the_router_rate_is_the_stages(alone: platform.Process) -> None:
    trainer, stage = made(alone)
    for rate in (0.0, 0.25):
        trainer.enter(replace(stage, router_bias_update_rate=rate))
        biases = [b.clone() for name, b in trainer.models[0].named_buffers() if name.endswith("expert_bias")]
        trainer.step(1, [batch(ROWS)])
        after = [b for name, b in trainer.models[0].named_buffers() if name.endswith("expert_bias")]
        moved = {round(float(x), 6) for a, b in zip(after, biases, strict=True) for x in (a - b).abs()}
        assert moved <= {0.0, rate} and rate in moved


def moments(trainer: Trainer) -> list[torch.Tensor]:
    return [
        value.clone()
        for part in parts(trainer.optimizer)
        for group in part.optimizer.param_groups
        for parameter in group["params"]
        for value in (parameter.detach(), *part.optimizer.state[parameter].values())
        if torch.is_tensor(value)
    ]


def test_longer_sequences_keep_the_optimizers_state(alone: platform.Process) -> None:
    trainer, stage = made(alone)
    trainer.enter(stage)
    trainer.step(1, [batch(ROWS)])
    before = moments(trainer)
    trainer.enter(replace(stage, sequence_length=64, rope_theta=50_000.0, mtp_loss_factor=0.3))
    assert all(torch.equal(a, b) for a, b in zip(before, moments(trainer), strict=True))
    long = [torch.cat([a[:-1], b]) for a, b in zip(ROWS[::2], ROWS[1::2], strict=True)]  # 65 tokens
    trainer.step(2, [batch(long)])
    steps = {int(group["step"]) for part in parts(trainer.optimizer) for group in part.optimizer.param_groups}
    assert steps == {2}
    assert not all(torch.equal(a, b) for a, b in zip(before, moments(trainer), strict=True))
