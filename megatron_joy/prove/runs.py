"""The two runs of a proof, as each rank does them: the reference in one process, and the layout that follows it."""

import time
from dataclasses import dataclass
from typing import Self

from megatron_joy.checkpoint.find import open_checkpoint
from megatron_joy.checkpoint.load import load_checkpoint
from megatron_joy.checkpoint.marker import folder_name
from megatron_joy.checkpoint.save import save_checkpoint
from megatron_joy.model.build import build_model
from megatron_joy.platform import process as platform
from megatron_joy.platform.world import tell
from megatron_joy.prove.numbers import Papers, Run, Step, Validation
from megatron_joy.prove.routing import RoutingBook, RoutingFollow, RoutingRecord
from megatron_joy.prove.samples import batches
from megatron_joy.prove.weights import largest_difference, write_whole
from megatron_joy.recipe.schema import Recipe
from megatron_joy.train.step import StepResult, Trainer

UNRELATED = 7919  # added to the seed of weights that a checkpoint must replace


def _step(recipe: Recipe, number: int, result: StepResult) -> Step:
    routed = recipe.train.global_batch_size * recipe.data.sequence_length * recipe.model.num_experts_per_tok
    load = [] if result.expert_load is None else (result.expert_load.double() * routed).round().int().tolist()
    return Step(number, result.loss, result.mtp_loss, result.grad_norm, load)


@dataclass(frozen=True)
class _Trained:
    """A model under a recipe on this rank."""

    recipe: Recipe
    process: platform.Process
    trainer: Trainer

    @classmethod
    def start(cls, recipe: Recipe, weights_seed: int) -> Self:
        process = platform.start(recipe.layout, recipe.seed)
        chunks = build_model(recipe.model_copy(update={"seed": weights_seed}), process)
        return cls(recipe, process, Trainer(recipe, process, chunks))

    def train(self, numbers: range, book: RoutingBook) -> list[Step]:
        """The steps of these numbers, counted from 1; on rank 0 what they gave."""
        steps = []
        for number in numbers:
            micro_batches = batches(self.recipe, number, self.process.groups.dp.rank())
            book.begin(number, micro_batches)
            result = self.trainer.step(number, micro_batches)
            if self.process.is_first_rank:
                steps.append(_step(self.recipe, number, result))
                tell(number)
        return steps

    def validate(self, book: RoutingBook) -> Validation:
        """Losses of the samples that the step after the last one would have."""
        number = self.recipe.train.steps + 1
        micro_batches = batches(self.recipe, number, self.process.groups.dp.rank())
        book.begin(number, micro_batches)
        losses = self.trainer.evaluate(micro_batches)
        return Validation(losses.main, losses.mtp)


def lead(recipe: Recipe, papers: Papers, before: int) -> Run:
    """One process: `before` steps, the checkpoint, the other steps, and the weights that these end with.

    The steps before make moments, router biases and the optimizer's count differ from what a start would have.
    """
    run = _Trained.start(recipe, recipe.seed)
    book = RoutingRecord(recipe, run.process, run.trainer.chunks)
    run.train(range(1, before + 1), book)
    save_checkpoint(
        papers.checkpoints,
        before,
        recipe=recipe,
        chunks=run.trainer.chunks,
        optimizer=run.trainer.optimizer,
        process=run.process,
        state={"step": before},
    )
    began = time.monotonic()
    steps = run.train(range(before + 1, recipe.train.steps + 1), book)
    seconds = time.monotonic() - began
    validation = run.validate(book)
    write_whole(papers.weights, run.trainer.chunks, run.process)
    book.write(papers.routing)
    platform.stop()
    return Run(steps, seconds, validation)


def follow(recipe: Recipe, papers: Papers, before: int) -> Run:
    """A rank of the layout: unrelated weights, the checkpoint resharded into them, the steps, its parts compared."""
    run = _Trained.start(recipe, recipe.seed + UNRELATED)
    load_checkpoint(
        open_checkpoint(papers.checkpoints / folder_name(before)),
        chunks=run.trainer.chunks,
        optimizer=run.trainer.optimizer,
        process=run.process,
    )
    book = RoutingFollow(recipe, run.process, run.trainer.chunks, papers.routing)
    began = time.monotonic()
    steps = run.train(range(before + 1, recipe.train.steps + 1), book)
    seconds = time.monotonic() - began
    validation = run.validate(book)
    worst = largest_difference(papers.weights, run.trainer.chunks, run.process)
    platform.stop()
    return Run(steps, seconds, validation, worst, book.told)


def unrounded(recipe: Recipe, papers: Papers, before: int) -> Run:
    """One process in fp32 from the seed, with the reference's routing: how far off the reference's number format is."""
    run = _Trained.start(recipe, recipe.seed)
    book = RoutingFollow(recipe, run.process, run.trainer.chunks, papers.routing)
    began = time.monotonic()
    steps = run.train(range(1, recipe.train.steps + 1), book)[before:]
    seconds = time.monotonic() - began
    validation = run.validate(book)
    worst = largest_difference(papers.weights, run.trainer.chunks, run.process)
    platform.stop()
    return Run(steps, seconds, validation, worst, book.told)
