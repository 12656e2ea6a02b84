"""Validation: every so often, and at the end, the same samples of the validation blend."""

from collections.abc import Sequence

from megatron_joy.data.batch import Batch
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.step import Losses, StepResult


class Validation(Feature):
    """Holds this rank's micro-batches in memory: they never change."""

    def __init__(self, batches: Sequence[Batch], interval: int) -> None:
        self.batches, self.interval = batches, interval
        self.last: Losses | None = None

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Adds validation_loss and validation_mtp_loss to the row of the steps that have them."""
        step, progress = loop.run.progress.step, loop.run.progress
        if step % self.interval and step != loop.run.recipe.train.steps:
            return
        losses = loop.trainer.evaluate(self.batches)
        self.last = losses
        best = progress.best_validation_loss
        progress.best_validation_loss = losses.main if best is None else min(best, losses.main)
        loop.row["validation_loss"] = losses.main
        if losses.mtp is not None:
            loop.row["validation_mtp_loss"] = losses.mtp
