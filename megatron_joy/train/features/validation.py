"""Validation: every so often, and at the end, the same samples of the validation blend."""

from collections.abc import Sequence

from megatron_joy.data.batch import Batch
from megatron_joy.train.acceptance import measure_acceptance
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.phases import VALIDATION
from megatron_joy.train.step import StepResult


class Validation(Feature):
    """Holds this rank's micro-batches in memory: they never change."""

    phase = VALIDATION

    def __init__(self, batches: Sequence[Batch], interval: int, acceptance_passes: int) -> None:
        self.batches, self.interval, self.passes = batches, interval, acceptance_passes

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Adds validation losses and how MTP drafts fare to the row of the steps that have them."""
        progress = loop.run.progress
        if not (result.finite and result.made) or (progress.step % self.interval and not loop.done):
            return
        losses = loop.trainer.evaluate(self.batches)
        best = progress.best_validation_loss
        progress.best_validation_loss = losses.main if best is None else min(best, losses.main)
        loop.row["validation_loss"] = losses.main
        if losses.mtp is not None:
            loop.row["validation_mtp_loss"] = losses.mtp
            with loop.trainer.scales.kept():
                acceptance = measure_acceptance(loop.trainer, self.batches, self.passes) if self.passes else None
            loop.row |= acceptance.as_row() if acceptance else {}
