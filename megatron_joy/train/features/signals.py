"""SIGTERM or Ctrl-C: finish the step, checkpoint, leave with a distinct exit code. All ranks agree on the step."""

import torch
import torch.distributed as dist

from megatron_joy.platform.stop_request import StopRequest
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.step import StepResult


class StopOnSignal(Feature):
    """A signal reaches ranks at different times, or only one: after each step they take the maximum of their flags."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request

    def _agree(self, loop: Loop) -> None:
        flag = torch.tensor([int(self.request.received)], device=loop.run.process.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        loop.wants_stop = loop.wants_stop or bool(flag.item())

    def on_start(self, loop: Loop) -> None:
        """A signal that came while the process was starting stops the run before its first step."""
        self._agree(loop)

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Sets `wants_stop` on all ranks if any rank got the signal."""
        self._agree(loop)
