"""Numbers that are none and spikes: stop, say so, leave an update out, or go back and leave its samples out."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megatron_joy.errors import HopelessError, WorkError
from megatron_joy.recipe.ledger import is_skipped, rollbacks, skipped_updates, with_skipped
from megatron_joy.recipe.timetable import rate_key
from megatron_joy.train.blame import Culprit, find_culprit, worst_micro_batch
from megatron_joy.train.features.rollback import Rollback
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.run import Progress
from megatron_joy.train.spikes import deviations
from megatron_joy.train.step import Computed, StepResult

Kind = Literal["nonfinite", "spike"]


def afterwards(loop: Loop) -> str:
    """What a run that stops has kept, and what to try."""
    return (
        "nothing of this step is saved, the same command goes on from the last checkpoint; if it comes again, lower "
        f"{rate_key(loop.run.recipe, loop.plan.stage)} or remove the newest checkpoint"
    )


@dataclass(frozen=True)
class Finding:
    """What is wrong with an update, in words, and where it came from."""

    kind: Kind
    what: str
    culprit: Culprit | None


class Guard(Feature):
    """Comes after the metrics, which then show the bad step, and before the checkpoint.

    Every decision follows from numbers that rank 0 hands to all, from the recipe and from what a checkpoint keeps; so
    all ranks take the same one, and take it again when the step comes again.
    """

    def __init__(self, rollback: Rollback) -> None:
        self.rollback = rollback
        self.finding: Finding | None = None
        self.numbers = (0.0, 0.0)  # loss and gradient norm
        self.spiked = -1  # the newest update with a spike
        self.known = False  # the ledger says already that this update is left out

    def on_start(self, loop: Loop) -> None:
        """Removes checkpoints that the run went back on, should a kill have left them."""
        self.rollback.clean(loop)

    def after_backward(self, loop: Loop, computed: Computed) -> None:
        """Looks at the loss and the gradient norm, and refuses an update that must not be made."""
        run = loop.run
        self.finding, self.known = None, is_skipped(run.ledger, computed.number)
        if self.known:
            loop.trainer.refused = "left out as the ledger says"
            return
        numbers = torch.tensor([computed.losses.main, computed.grad_norm], dtype=torch.float64)
        numbers = numbers.to(run.process.device)
        dist.broadcast(numbers, src=0)
        self.numbers = loss, norm = numbers[0].item(), numbers[1].item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            culprit = find_culprit(run, loop.trainer, computed.number, computed.batches)
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
            self.finding = Finding("nonfinite", what, culprit)
            loop.trainer.refused = what
        elif what := self._spike(loop, loss, norm):
            warned_before = run.recipe.guards.spike == "warn" and self.spiked == computed.number - 1
            # Looking documents up opens shards: once is enough where a run only says that its loss stays high.
            self.finding = Finding("spike", what, None if warned_before else worst_micro_batch(run, computed))
            self.spiked = computed.number
            loop.trainer.refused = what if run.recipe.guards.spike != "warn" else None

    def _spike(self, loop: Loop, loss: float, norm: float) -> str:
        """What is so far above the window's numbers, in words; nothing while the stage has fewer than a window."""
        guards, progress = loop.run.recipe.guards, loop.run.progress
        if guards.spike == "off":
            return ""
        if progress.recent_stage != loop.plan.stage.name:  # another blend or length has another loss
            progress.recent_stage, progress.recent_losses, progress.recent_grad_norms = loop.plan.stage.name, [], []
        if len(progress.recent_losses) < guards.spike_window:
            return ""
        for name, value, window, limit in (
            ("loss", loss, progress.recent_losses, guards.spike_loss),
            ("gradient norm", norm, progress.recent_grad_norms, guards.spike_grad_norm),
        ):
            height = deviations(value, window) if limit else 0.0
            if limit and height > limit:
                return f"the {name} is {value:.6g}, {height:.1f} robust deviations above the last {len(window)}"
        return ""

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Carries the decision out. Raises WorkError where the run must stop, for a validation loss too; HopelessError
        where a restart would come to the same.
        """
        number, finding = loop.run.progress.step, self.finding
        validation = loop.row.get("validation_loss", 0.0)
        if finding is not None:
            self._act(loop, number, finding)
        elif self.known:
            loop.tell("on_decision", "skip", "this update is left out again: the ledger says so")
        elif not math.isfinite(validation):
            raise WorkError(f"step {number}: the validation loss is {validation}; {afterwards(loop)}")
        if result.made and not loop.went_back:
            self._remember(loop.run.progress, loop.run.recipe.guards.spike_window)

    def _remember(self, progress: Progress, window: int) -> None:
        loss, norm = self.numbers
        progress.recent_losses = [*progress.recent_losses, loss][-window:]
        progress.recent_grad_norms = [*progress.recent_grad_norms, norm][-window:]

    def _act(self, loop: Loop, number: int, finding: Finding) -> None:
        guards = loop.run.recipe.guards
        where = self._where(finding)
        if finding.kind == "nonfinite" and guards.nonfinite == "stop":
            self._say(loop, "nonfinite", f"{finding.what}{where}", finding)
            # What came again when it was computed again comes again after a restart; a machine's fault may not.
            kind = HopelessError if finding.culprit else WorkError
            raise kind(f"step {number}: {finding.what}; {afterwards(loop)}{where}")
        if finding.kind == "spike" and guards.spike == "warn":
            self._say(loop, "spike", f"{finding.what}{where}", finding)
            return
        if finding.kind == "spike" and guards.spike == "rollback":
            if rollbacks(loop.run.ledger) >= guards.max_rollbacks:
                raise HopelessError(
                    f"step {number}: {finding.what}, and the run has gone back {guards.max_rollbacks} times already "
                    f"(guards.max_rollbacks); {afterwards(loop)}{where}"
                )
            if self.rollback.go_back(loop, number, f"{finding.what}{where}"):
                return
        decided = with_skipped(loop.run.ledger, number)
        self.rollback.decide(loop, decided)
        self._say(loop, "skip", f"update {number} is left out: {finding.what}{where}", finding)
        self._count(loop, number, f"{finding.what}{where}")

    @staticmethod
    def _where(finding: Finding) -> str:
        if finding.culprit is not None:
            return f"; {finding.culprit}"
        if finding.kind == "nonfinite":
            return "; computed again every number is one, so it is neither the data nor the weights: suspect a machine"
        return ""

    @staticmethod
    def _say(loop: Loop, kind: str, message: str, finding: Finding) -> None:
        extra = {} if finding.culprit is None else finding.culprit.as_extra()
        loop.tell("on_decision", kind, message, **extra)

    @staticmethod
    def _count(loop: Loop, number: int, what: str) -> None:
        """Stops a run that leaves out too much."""
        rate = rate_key(loop.run.recipe, loop.plan.stage)
        guards, skipped = loop.run.recipe.guards, set(skipped_updates(loop.run.ledger))
        in_a_row = next(n for n in range(number + 1) if number - n not in skipped)
        for count, key in ((in_a_row, "max_skipped_in_a_row"), (len(skipped), "max_skipped")):
            if count >= getattr(guards, key):
                raise HopelessError(
                    f"step {number}: {what}; {count} updates are left out now (guards.{key}); the same command goes on "
                    f"from the last checkpoint; lower {rate} or look at the data named here"
                )
