"""AdamW with the state layout of Transformer Engine's FusedAdam, for machines without it."""

from collections.abc import Iterable
from typing import Any

import torch


class GroupStepAdamW(torch.optim.Optimizer):
    """Decoupled-weight-decay Adam (Loshchilov and Hutter, arXiv 1711.05101) in fp32.

    Megatron-core's distributed optimizer can save and load only the layout that FusedAdam has: 'exp_avg' and
    'exp_avg_sq' per tensor, one integer 'step' per parameter group. torch's AdamW keeps a step per tensor instead.
    Moments that are kept in bf16 are widened, updated and used in fp32, and rounded to nearest when they are put back,
    as in FusedAdam (Transformer Engine, multi_tensor/adam.cu).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        exp_avg_dtype: torch.dtype = torch.float32,
        **unused: Any,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("GroupStepAdamW has decoupled weight decay only")
        self.exp_avg_dtype = exp_avg_dtype  # of both moments, in which they are kept; FusedAdam's name
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
                    zeros = torch.zeros_like(param, dtype=self.exp_avg_dtype)
                    state["exp_avg"], state["exp_avg_sq"] = zeros, zeros.clone()
            grads = [p.grad for p in params]
            kept = [[self.state[p][moment] for p in params] for moment in ("exp_avg", "exp_avg_sq")]
            first, second = ([moment.float() for moment in moments] for moments in kept)  # themselves, if fp32
            beta1, beta2 = group["betas"]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            if self.exp_avg_dtype != torch.float32:
                torch._foreach_copy_(kept[0], first)
                torch._foreach_copy_(kept[1], second)
            denominator = torch._foreach_sqrt(second)
            torch._foreach_div_(denominator, (1 - beta2 ** group["step"]) ** 0.5)
            torch._foreach_add_(denominator, group["eps"])
            torch._foreach_addcdiv_(params, first, denominator, -group["lr"] / (1 - beta1 ** group["step"]))
