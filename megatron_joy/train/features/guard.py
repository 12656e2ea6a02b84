"""Stops a run whose numbers are no numbers, before a checkpoint can keep them."""

import math

from megatron_joy.errors import WorkError
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.step import StepResult


class Guard(Feature):
    """Loss and gradient norm are equal on all ranks, so all stop together."""

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Raises WorkError when the loss or the gradient norm is NaN or infinite."""
        for name, value in (("loss", result.loss), ("gradient norm", result.grad_norm)):
            if not math.isfinite(value):
                raise WorkError(
                    f"step {loop.run.progress.step}: the {name} is {value}; the weights are spoilt and not saved, start "
                    "again to resume from the last whole checkpoint, with a lower schedule.peak_lr if it happens again"
                )
