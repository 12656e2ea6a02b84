"""Silent corruption: now and then an update is computed twice, and every bit of its gradients must be the same."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_joy.data.batch import Batch
from megatron_joy.errors import WorkError
from megatron_joy.train.blame import local_gradients
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.step import Computed, StepResult


class Recheck(Feature):
    """Comes after the metrics and before the guard: what a machine got wrong is no matter of the data.

    Gradients are compared before they are reduced, so that a rank is named and not all that it shares them with. Costs
    a forward and backward pass and a copy of the gradients in such a step, and nothing in others.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._sums: tuple[float, ...] | None = None  # of losses, the first time; None in a step that isn't checked
        self._first: dict[str, Tensor] = {}
        self._differing: list[str] = []
        self._problem: str | None = None

    def before_forward(self, loop: Loop, batches: Sequence[Batch]) -> None:
        """The first time."""
        if loop.plan.number % self.interval:
            return
        self._sums = loop.trainer.compute_alone(batches).sums
        self._first = {name: grad.clone() for name, grad in local_gradients(loop.trainer)}

    def before_reduction(self, loop: Loop) -> None:
        """The second time: this rank's gradients again."""
        if self._sums is None:
            return
        again = local_gradients(loop.trainer)
        self._differing = [name for name, grad in again if not _same_bits(grad, self._first[name])]
        self._first = {}

    def after_backward(self, loop: Loop, computed: Computed) -> None:
        """All ranks hear of each; a difference anywhere refuses the update."""
        if self._sums is None:
            return
        mine = [f"the gradient of {name}" for name in self._differing]
        mine += [f"the loss of micro-batch {m}" for m, sums in enumerate(self._sums) if sums != computed.losses.sums[m]]
        self._sums = None
        answers: list[list[str]] = [mine] * loop.run.process.info.world_size
        dist.all_gather_object(answers, mine)
        if not any(answers):
            return
        rank = next(rank for rank, differing in enumerate(answers) if differing)
        more = f" and {len(answers[rank]) - 1} more" if len(answers[rank]) > 1 else ""
        ranks = [other for other, differing in enumerate(answers) if differing and other != rank]
        also = f"; also on ranks {', '.join(map(str, ranks))}" if ranks else ""
        self._problem = f"computed twice, rank {rank} got other bits: {answers[rank][0]}{more}{also}"
        loop.trainer.refused = self._problem

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Raises WorkError on all ranks after a difference."""
        if self._problem is None:
            return
        loop.tell("on_decision", "mismatch", self._problem)
        raise WorkError(
            f"step {loop.run.progress.step}: {self._problem}; nothing of this step is saved; take that machine out and "
            "go on with the same command, checkpoints since the last check that held may be wrong as well"
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
