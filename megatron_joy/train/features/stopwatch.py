"""How long a step takes, waiting for its data included, what other features do after it not."""

import time

from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.step import StepResult


class Stopwatch(Feature):
    """Comes first among the features."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def before_step(self, loop: Loop) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Adds step_seconds and tokens_per_second, of all processes together, to the row."""
        seconds = time.perf_counter() - self._started
        loop.row["step_seconds"] = seconds
        loop.row["tokens_per_second"] = loop.plan.tokens / seconds
