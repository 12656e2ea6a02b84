"""SIGTERM: finish the step, checkpoint, leave with a distinct exit code. All ranks agree on the step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.step import StepResult


class StopOnSignal(Feature):
    """A signal reaches ranks at different times, or only one: after each step they take the maximum of their flags."""

    def __init__(self) -> None:
        self.received = False
        self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Sets `wants_stop` on all ranks if any rank got the signal."""
        flag = torch.tensor([int(self.received)], device=loop.run.process.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        loop.wants_stop = loop.wants_stop or bool(flag.item())

    def close(self) -> None:
        """Puts the earlier handler back."""
        signal.signal(signal.SIGTERM, self._before)
