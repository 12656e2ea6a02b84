"""The training loop."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_joy.data.batch import Batch
from megatron_joy.train.moments import Feature
from megatron_joy.train.run import Run
from megatron_joy.train.step import Trainer


@dataclass
class Loop:
    """What the features see: the run, its trainer, and two wishes that any of them may express.

    A wish must be the same on all ranks (`features.signals` shows how ranks agree).
    """

    run: Run
    trainer: Trainer
    features: Sequence[Feature]
    notes: Sequence[str] = ()  # said once at the start: what was found on the way here
    wants_stop: bool = False
    row: dict[str, Any] = field(default_factory=dict)  # what features add to this step's row of metrics

    def tell(self, moment: str, *arguments: Any) -> None:
        """Calls a moment of every feature, in order."""
        for feature in self.features:
            getattr(feature, moment)(self, *arguments)


def train(loop: Loop, batches: Iterator[Sequence[Batch]]) -> None:
    """Runs updates until the recipe's steps are done or a feature wants to stop.

    `batches` yields the micro-batches of this rank for each step, from the first one that is not done yet.
    """
    run, trainer = loop.run, loop.trainer
    try:
        loop.tell("on_start")
        for note in loop.notes:
            loop.tell("on_note", note)
        while run.progress.step < run.recipe.train.steps and not loop.wants_stop:
            loop.row = {}
            loop.tell("before_step")
            result = trainer.step(run.progress.step + 1, next(batches))
            run.progress.advance(trainer.samples_per_step, trainer.tokens_per_step)
            loop.tell("after_step", result)
        loop.tell("on_finish")
    except BaseException as error:
        for feature in loop.features:
            feature.on_error(run, error)
        raise
    finally:
        for feature in reversed(loop.features):
            feature.close()
