"""AdamW with the state layout of Transformer Engine's FusedAdam, for machines without it."""

from collections.abc import Iterable
from typing import Any

import torch


class GroupStepAdamW(torch.optim.Optimizer):
    """Decoupled-weight-decay Adam (Loshchilov and Hutter, arXiv 1711.05101) in fp32.

    Megatron-core's distributed optimizer can save and load only the layout that FusedAdam has: 'exp_avg' and
    'exp_avg_sq' per tensor, one integer 'step' per parameter group. torch's AdamW keeps a step per tensor instead.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **unused: Any,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("GroupStepAdamW has decoupled weight decay only")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; an empty group counts its steps too."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for param in params:
                state = self.state[param]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
            grads = [p.grad for p in params]
            first = [self.state[p]["exp_avg"] for p in params]
            second = [self.state[p]["exp_avg_sq"] for p in params]
            beta1, beta2 = group["betas"]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            denominator = torch._foreach_sqrt(second)
            torch._foreach_div_(denominator, (1 - beta2 ** group["step"]) ** 0.5)
            torch._foreach_add_(denominator, group["eps"])
            torch._foreach_addcdiv_(params, first, denominator, -group["lr"] / (1 - beta1 ** group["step"]))
