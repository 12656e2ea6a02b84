"""When checkpoints are written, and what happens when one can't be."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_joy.checkpoint.background import BackgroundSaver, Outcome
from megatron_joy.checkpoint.retention import Policy, prune
from megatron_joy.checkpoint.save import Save, save_checkpoint
from megatron_joy.errors import WorkError
from megatron_joy.recipe.ledger import as_json
from megatron_joy.recipe.schema import CheckpointSection
from megatron_joy.recipe.timetable import rate_key
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.phases import CHECKPOINT
from megatron_joy.train.run import Run
from megatron_joy.train.step import StepResult


def policy_of(section: CheckpointSection) -> Policy:
    """Which checkpoints a recipe keeps."""
    return Policy(section.keep_last, section.keep_every, section.keep_best)


class Checkpointing(Feature):
    """Every `checkpoint.interval` steps, at the end and before a stop. Comes last: the metrics are on disk already."""

    phase = CHECKPOINT

    def __init__(self, run: Run, sources: Mapping[str, str], tokenizer: str) -> None:
        self.section, self.sources, self.tokenizer = run.recipe.checkpoint, dict(sources), tokenizer
        self.background = BackgroundSaver(run.process) if self.section.asynchronous else None

    def _save(self, loop: Loop) -> Save:
        """What is to be saved now; `train.resume` reads the state."""
        run = loop.run
        state: dict[str, Any] = {
            "progress": run.progress.as_dict(),
            "ledger": as_json(run.ledger),
            "sources": self.sources,
            "tokenizer": self.tokenizer,
            "attempt": run.attempt,
            "validation_loss": loop.row.get("validation_loss"),
        }
        return Save(run.folder / "checkpoints", run.progress.step, run.attempt, run.recipe, run.process, state)

    def _due(self, loop: Loop) -> tuple[bool, bool]:
        """(is one due, must it succeed)."""
        last = loop.done or loop.wants_stop
        interval = self.section.interval
        return last or (interval > 0 and loop.run.progress.step % interval == 0), last

    def _prune(self, run: Run) -> Sequence[str]:
        """On rank 0, in any thread; what is to be noted."""
        return prune(run.folder / "checkpoints", policy_of(self.section), run.attempt).notes

    def _prune_and_say(self, loop: Loop) -> None:
        if loop.run.process.is_first_rank:
            for note in self._prune(loop.run):
                loop.tell("on_note", note)

    def on_start(self, loop: Loop) -> None:
        """Frees the space that killed saves of earlier attempts hold."""
        self._prune_and_say(loop)

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Saves when due. A failure in the middle of a run is an alarm and the run goes on from memory; at its end, and
        before a stop, it is raised (WorkError): the work since the last whole checkpoint would be lost without a word.
        So are weights that are no numbers, which the losses of this step can't tell yet.
        """
        if self.background is not None:
            self._told(loop, self.background.poll())
        due, must_succeed = self._due(loop)
        if not due or loop.went_back:
            return
        if not loop.trainer.weights_are_finite():
            raise WorkError(
                f"step {loop.run.progress.step}: the update made weights NaN or infinite; they are not saved, the same "
                f"command goes on from the last checkpoint; lower {rate_key(loop.run.recipe, loop.plan.stage)}"
            )
        self._settle(loop)  # one at a time
        try:
            self._begin(loop, self._save(loop), wait=must_succeed)
        except WorkError as error:
            if must_succeed:
                raise
            self._alarm(loop, str(error))

    def on_rollback(self, loop: Loop) -> None:
        """Finishes what is on its way: it may be what the run goes back to."""
        self._settle(loop)

    def _settle(self, loop: Loop) -> None:
        """Waits for the checkpoint that is on its way, if one is; all ranks together."""
        if self.background is not None:
            self._told(loop, self.background.settle())

    def _begin(self, loop: Loop, save: Save, wait: bool) -> None:
        """Beside training, unless training has come to its end."""
        trainer = loop.trainer
        if self.background is not None and not wait:
            self.background.begin(save, trainer.chunks, trainer.optimizer, lambda: self._prune(loop.run))
            return
        started = time.perf_counter()
        path = save_checkpoint(
            save.folder,
            save.step,
            recipe=save.recipe,
            chunks=trainer.chunks,
            optimizer=trainer.optimizer,
            process=save.process,
            state=save.state,
            attempt=save.attempt,
        )
        loop.tell("on_checkpoint", save.step, f"{path.name} in {time.perf_counter() - started:.1f} s")
        self._prune_and_say(loop)

    @staticmethod
    def _alarm(loop: Loop, failure: str) -> None:
        """Somebody should look: the next failure may cost all that was done since the last whole checkpoint."""
        if loop.run.process.is_first_rank:  # once: all ranks know it
            loop.tell("on_alarm", f"{failure}; training goes on from memory")

    def _told(self, loop: Loop, outcome: Outcome | None) -> None:
        """Says how a save beside training ended."""
        if outcome is None:
            return
        if outcome.failure is not None:
            self._alarm(loop, outcome.failure)
            return
        message = f"{outcome.save.final.name} in {outcome.seconds:.1f} s beside training, which waited"
        loop.tell("on_checkpoint", outcome.save.step, f"{message} {outcome.waited:.2f} s")
        for note in outcome.notes if loop.run.process.is_first_rank else ():
            loop.tell("on_note", note)

    def close(self) -> None:
        """Gives up what is on its way after an error; after a planned end nothing is."""
        if self.background is not None:
            self.background.close()
