"""The two runs of a proof, as each rank does them: the reference in one process, and the layout that follows it."""

import time
from pathlib import Path

from megatron_joy.checkpoint.find import open_checkpoint
from megatron_joy.checkpoint.load import load_checkpoint
from megatron_joy.checkpoint.save import save_checkpoint
from megatron_joy.model.build import build_model
from megatron_joy.platform import process as platform
from megatron_joy.platform.world import tell
from megatron_joy.prove.numbers import Run, Step
from megatron_joy.prove.samples import batches
from megatron_joy.prove.weights import largest_difference, write_whole
from megatron_joy.recipe.schema import Recipe
from megatron_joy.train.step import StepResult, Trainer

UNRELATED = 7919  # added to the seed of weights that a checkpoint must replace


def _step(recipe: Recipe, number: int, result: StepResult) -> Step:
    routed = recipe.train.global_batch_size * recipe.data.sequence_length * recipe.model.num_experts_per_tok
    load = [] if result.expert_load is None else (result.expert_load.double() * routed).round().int().tolist()
    return Step(number, result.loss, result.mtp_loss, result.grad_norm, load)


def _train(recipe: Recipe, process: platform.Process, trainer: Trainer, numbers: range) -> list[Step]:
    steps = []
    for number in numbers:
        result = trainer.step(number, batches(recipe, number, process.groups.dp.rank()))
        if process.is_first_rank:
            steps.append(_step(recipe, number, result))
            tell(number)
    return steps


def lead(recipe: Recipe, checkpoints: Path, before: int, weights: Path) -> Run:
    """One process: `before` steps, the checkpoint, the other steps, and the weights that these end with.

    The steps before make moments, router biases and the optimizer's count differ from what a start would have.
    """
    process = platform.start(recipe.layout, recipe.seed)
    chunks = build_model(recipe, process)
    trainer = Trainer(recipe, process, chunks)
    _train(recipe, process, trainer, range(1, before + 1))
    save_checkpoint(
        checkpoints,
        before,
        recipe=recipe,
        chunks=trainer.chunks,
        optimizer=trainer.optimizer,
        process=process,
        state={"step": before},
    )
    began = time.monotonic()
    steps = _train(recipe, process, trainer, range(before + 1, recipe.train.steps + 1))
    seconds = time.monotonic() - began
    write_whole(weights, trainer.chunks, process)
    platform.stop()
    return Run(steps, None, seconds)


def follow(recipe: Recipe, checkpoint: Path, weights: Path) -> Run:
    """A rank of the layout: unrelated weights, the checkpoint resharded into them, the steps, its parts compared."""
    process = platform.start(recipe.layout, recipe.seed)
    chunks = build_model(recipe.model_copy(update={"seed": recipe.seed + UNRELATED}), process)
    trainer = Trainer(recipe, process, chunks)
    state = load_checkpoint(
        open_checkpoint(checkpoint), chunks=trainer.chunks, optimizer=trainer.optimizer, process=process
    )
    began = time.monotonic()
    steps = _train(recipe, process, trainer, range(int(state["step"]) + 1, recipe.train.steps + 1))
    seconds = time.monotonic() - began
    worst = largest_difference(weights, trainer.chunks, process)
    platform.stop()
    return Run(steps, worst, seconds)
