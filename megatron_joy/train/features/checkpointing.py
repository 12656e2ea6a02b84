"""When checkpoints are written, and what happens when one can't be."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_joy.checkpoint.retention import prune
from megatron_joy.checkpoint.save import save_checkpoint
from megatron_joy.errors import WorkError
from megatron_joy.recipe.ledger import as_json
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.run import Run
from megatron_joy.train.step import StepResult


class Checkpointing(Feature):
    """Every `interval` steps, at the end and before a stop. Comes last: the metrics are then on disk already."""

    def __init__(self, interval: int, keep_last: int, sources: Mapping[str, str]) -> None:
        self.interval, self.keep_last, self.sources = interval, keep_last, dict(sources)

    def _state(self, run: Run) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors; `train.pretrain` reads it on resume."""
        return {
            "progress": run.progress.as_dict(),
            "ledger": as_json(run.ledger),
            "sources": self.sources,
            "attempt": run.attempt,
        }

    def _save(self, loop: Loop) -> Path:
        run = loop.run
        return save_checkpoint(
            run.folder / "checkpoints",
            run.progress.step,
            recipe=run.recipe,
            chunks=loop.trainer.chunks,
            optimizer=loop.trainer.optimizer,
            process=run.process,
            state=self._state(run),
            attempt=run.attempt,
        )

    def _due(self, loop: Loop) -> tuple[bool, bool]:
        """(is one due, must it succeed)."""
        last = loop.done or loop.wants_stop
        return last or (self.interval > 0 and loop.run.progress.step % self.interval == 0), last

    def _prune(self, loop: Loop) -> None:
        if loop.run.process.is_first_rank:
            for note in prune(loop.run.folder / "checkpoints", self.keep_last, loop.run.attempt).notes:
                loop.tell("on_note", note)

    def on_start(self, loop: Loop) -> None:
        """Frees the space that killed saves of earlier attempts hold."""
        self._prune(loop)

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Saves when due. A failure in the middle of a run is noted and the run goes on from memory; at its end, and
        before a stop, it is raised (WorkError): the work since the last whole checkpoint would be lost without a word.
        So are weights that are no numbers, which the losses of this step can't tell yet.
        """
        due, must_succeed = self._due(loop)
        if not due or loop.went_back:
            return
        if not loop.trainer.weights_are_finite():
            raise WorkError(
                f"step {loop.run.progress.step}: the update made weights NaN or infinite; they are not saved, the same "
                "command goes on from the last checkpoint; lower schedule.peak_lr"
            )
        started = time.perf_counter()
        try:
            path = self._save(loop)
        except WorkError as error:
            if must_succeed:
                raise
            loop.tell("on_note", f"{error}; training goes on from memory")
            return
        loop.tell("on_checkpoint", f"{path.name} in {time.perf_counter() - started:.1f} s")
        self._prune(loop)
