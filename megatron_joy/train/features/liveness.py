"""What a supervisor looks at from outside: each rank's heartbeat, and the run's state from rank 0."""

import os

from megatron_joy.recipe.timetable import Stage
from megatron_joy.runstate import FENCE_VARIABLE
from megatron_joy.runstate.heartbeat import Heart
from megatron_joy.runstate.lease import check_fence
from megatron_joy.runstate.state import State, Word, write_state
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.run import Run
from megatron_joy.train.step import StepResult


class Liveness(Feature):
    """Comes first: what it times is the update alone, and no checkpoint is written by an attempt that was given up."""

    def __init__(self, run: Run) -> None:
        self.fence = int(os.environ.get(FENCE_VARIABLE, "0"))  # 0: nobody supervises
        self.heart = Heart(run.folder, run.process.info.rank, self.fence)
        self.speaks = run.process.is_first_rank and self.fence > 0

    def _say(self, loop: Loop, word: Word) -> None:
        if self.speaks:
            write_state(loop.run.folder, State(self.fence, word, loop.run.progress.step))

    def on_start(self, loop: Loop) -> None:
        """All ranks have come to the loop."""
        self._say(loop, "running")
        self.heart.beat(loop.run.progress.step, "start")

    def on_stage_change(self, loop: Loop, stage: Stage) -> None:
        """Updates of another stage may take longer."""
        self.heart.forget()

    def before_step(self, loop: Loop) -> None:
        """The clock of this update starts."""
        self.heart.beat(loop.run.progress.step, "step")

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Raises WorkError on rank 0, without which no checkpoint is whole, when a later attempt has been begun."""
        self.heart.beat(loop.run.progress.step, "between")
        if self.speaks:
            check_fence(loop.run.folder, self.fence)

    def on_finish(self, loop: Loop) -> None:
        """All ranks agreed to leave, and what had to be saved is saved."""
        self.heart.beat(loop.run.progress.step, "end")
        self._say(loop, "finished" if loop.done else "stopped")
