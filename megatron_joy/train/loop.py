"""The training loop."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from megatron_joy.data.batch import Batch
from megatron_joy.recipe.timetable import Stage, StepPlan
from megatron_joy.train.moments import Feature, tell_error
from megatron_joy.train.run import Run
from megatron_joy.train.step import Trainer


@dataclass
class Loop:
    """What the features see: the run, its trainer, and a wish that any may express, the same on all ranks."""

    run: Run
    trainer: Trainer
    features: Sequence[Feature]
    notes: Sequence[str] = ()  # said once at the start: what was found on the way here
    wants_stop: bool = False
    stage: Stage | None = None  # that the model is set up for
    plan: StepPlan = field(init=False)  # of the update that is computed
    row: dict[str, Any] = field(default_factory=dict)  # what features add to this step's row of metrics
    went_back: bool = False  # in this step, to an earlier one

    def __post_init__(self) -> None:
        self.trainer.tell = self.tell

    def look_up(self, number: int) -> bool:
        """Turns to update `number` of the timetable; whether it is another stage's than the one before."""
        self.row, self.went_back = {}, False
        before, self.plan = self.stage, self.trainer.timetable.at(number)
        self.stage = self.plan.stage
        return before is not self.stage

    @property
    def last_step(self) -> int:
        """The step after which the run leaves: that of `run.last_stage`, or of the recipe."""
        name, ends = self.run.recipe.run.last_stage, {s.name: s.last_step for s in self.trainer.timetable.stages}
        return ends[name] if name else self.run.recipe.train.steps

    @property
    def done(self) -> bool:
        """Whether all steps are trained that the recipe asks for."""
        return self.run.progress.step >= self.last_step

    def tell(self, moment: str, *arguments: Any, **more: Any) -> None:
        """Calls a moment of every feature, in order."""
        for feature in self.features:
            self.trainer.phases.call(feature.phase, getattr(feature, moment), self, *arguments, **more)


def train(loop: Loop, batches: Iterator[Sequence[Batch]]) -> None:
    """Runs updates until the recipe's steps are done or a feature wants to stop.

    `batches` yields the micro-batches of this rank for each step, from the first one that is not done yet.
    """
    run, trainer = loop.run, loop.trainer
    with ExitStack() as closing:
        for feature in loop.features:
            closing.callback(feature.close)
        try:
            loop.tell("on_start")
            for note in loop.notes:
                loop.tell("on_note", note)
            while not (loop.done or loop.wants_stop):
                number = run.progress.step + 1
                if loop.look_up(number):
                    loop.tell("on_stage_change", loop.stage)
                loop.tell("before_step")
                result = trainer.step(number, next(batches))
                run.progress.advance(loop.plan.global_batch_size, loop.plan.tokens)
                loop.tell("after_step", result)
            loop.tell("on_finish")
        except BaseException as error:
            tell_error(loop.features, run, error)
            raise
