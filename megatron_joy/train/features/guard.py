"""Stops a run whose numbers are no numbers, before a checkpoint can keep them."""

import math

from megatron_joy.errors import WorkError
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.step import StepResult


class Guard(Feature):
    """Comes after the metrics, which then show the bad step, and before the checkpoint.

    The numbers are equal on all ranks, so all stop together.
    """

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Raises WorkError when the loss, the gradient norm or the validation loss is NaN or infinite."""
        numbers = {
            "loss": result.loss,
            "gradient norm": result.grad_norm,
            "validation loss": loop.row.get("validation_loss", 0.0),
        }
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise WorkError(
                    f"step {loop.run.progress.step}: the {name} is {value}; nothing of this step is saved, the same "
                    "command goes on from the last checkpoint; if it comes again, lower schedule.peak_lr or remove "
                    "the newest checkpoint"
                )
