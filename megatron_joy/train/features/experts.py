"""An alarm for experts that get no tokens: parameters that are paid for and learn nothing."""

import torch
from torch import Tensor

from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.step import StepResult

NAMED = 8  # experts in one message


class DeadExperts(Feature):
    """On rank 0, which has the load. A restart begins to count anew."""

    def __init__(self, patience: int, first_layer: int) -> None:
        """patience: steps without a token; first_layer: the model's layer (0 = first) that row 0 of the load is of."""
        self.patience, self.first_layer = patience, first_layer
        self.idle: Tensor | None = None  # [MoE layers, experts]: steps in a row without a token

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Tells of those whose patience ended in this step, once until they get tokens again."""
        if result.expert_load is None:
            return
        without = result.expert_load == 0
        before = torch.zeros_like(without, dtype=torch.int64) if self.idle is None else self.idle
        self.idle = torch.where(without, before + 1, 0)
        dead = (self.idle == self.patience).nonzero().tolist()
        if dead:
            names = [f"layer {layer + self.first_layer} expert {expert}" for layer, expert in dead[:NAMED]]
            more = f" and {len(dead) - NAMED} more" if len(dead) > NAMED else ""
            loop.tell("on_alarm", f"no token in {self.patience} steps: {', '.join(names)}{more}")
