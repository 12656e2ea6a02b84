"""The named moments of the training loop. A feature overrides those it needs; the loop knows no feature by name."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_joy.data.batch import Batch
from megatron_joy.recipe.timetable import Stage
from megatron_joy.train.run import Run
from megatron_joy.train.step import Computed, StepResult

if TYPE_CHECKING:
    from megatron_joy.train.loop import Loop

logger = logging.getLogger(__name__)


class Feature:
    """Does nothing at every moment. All ranks reach the same moments in the same order, but for three: `on_error`,
    `on_note` and `on_alarm`, which any rank may come to alone. None of them may issue a collective.

    `phase`: where the time that a feature takes is counted (see `train.phases`); None: nowhere.
    """

    phase: str | None = None

    def on_start(self, loop: "Loop") -> None:
        """Once, when weights and progress are in place."""

    def on_stage_change(self, loop: "Loop", stage: Stage) -> None:
        """The next update is the stage's first, or the attempt's first: everything that the stage sets is due."""

    def before_step(self, loop: "Loop") -> None:
        """Before update `progress.step + 1` is computed."""

    def before_forward(self, loop: "Loop", batches: Sequence[Batch]) -> None:
        """The step has its micro-batches; nothing is computed yet."""

    def before_reduction(self, loop: "Loop") -> None:
        """Forward and backward are done; gradients are still each rank's own."""

    def after_backward(self, loop: "Loop", computed: Computed) -> None:
        """Gradients are reduced, the update isn't made. Setting `loop.trainer.refused`, on all ranks, prevents it."""

    def after_step(self, loop: "Loop", result: StepResult) -> None:
        """After the update; progress already counts it."""

    def on_checkpoint(self, loop: "Loop", step: int, message: str) -> None:
        """A whole checkpoint of `step` is on disk, this step or an earlier one; the message says how long it took."""

    def on_decision(self, loop: "Loop", kind: str, message: str, **extra: Any) -> None:
        """A guard saw or did something (docs/guards.md lists the kinds), the same on all ranks."""

    def on_rollback(self, loop: "Loop") -> None:
        """Before the run goes back to a checkpoint: what is being written must be finished, or given up."""

    def on_note(self, loop: "Loop", message: str) -> None:
        """Something happened that the run's record should have, in a line."""

    def on_alarm(self, loop: "Loop", message: str) -> None:
        """As `on_note`, but somebody should look."""

    def on_finish(self, loop: "Loop") -> None:
        """The loop ended as planned: all steps done, or a stop was asked for."""

    def on_error(self, run: Run, error: BaseException) -> None:
        """This rank failed. No collective may be issued: other ranks may be gone."""

    def close(self) -> None:
        """Always, last; no collectives."""


def tell_error(features: Sequence[Feature], run: Run, error: BaseException) -> None:
    """Every feature hears of the error; one that fails at that must not hide it."""
    for feature in features:
        try:
            feature.on_error(run, error)
        except Exception:
            logger.exception("%s could not take note of the error", type(feature).__name__)
