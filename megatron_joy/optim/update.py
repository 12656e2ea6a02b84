"""Megatron-core's optimizer step in two halves, so that somebody may look at the gradients before weights change."""

from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_joy.optim.build import parts


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Hands the reduced gradients to the optimizer and gives their global norm; all ranks call it together."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def make_update(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clips by the norm that `gradient_norm` gave, and updates; the two are `optimizer.step()`, bit for bit."""
    for part in parts(optimizer):
        parameters: list[Any] = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
