"""The MTP loss with one denominator: the step's global count of MTP targets, whatever the layout.

The objective of a step over all samples is (arXiv 2604.03044, 2.1 and 2.4)

    L = sum(main token losses) / N_main + mtp_loss_factor * sum(MTP token losses) / N_mtp

Megatron-core divides all gradients by N_main at the end (calculate_per_token_loss), so the MTP sum enters the backward
pass with the weight mtp_loss_factor * N_main / N_mtp. Both counts are known before the step starts, since labels and
masks are data; the training step puts their ratio into `MTPTargets.weight`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_joy.platform.replacements import MTP_LOSS, rebind


@dataclass
class MTPTargets:
    """Travels through the model as its `loss_mask` argument, which Megatron-core only hands to the MTP loss."""

    labels: Tensor  # [b, s] int64: token t+2
    mask: Tensor  # [b, s] fp32: 1 where t+2 is in the same document and was read
    weight: float  # N_main / N_mtp of the step
    loss_sum: Tensor | None = None  # fp32 scalar, filled in by the forward pass

    def __bool__(self) -> bool:
        """Megatron-core may ask whether there is a mask at all."""
        return True


def process_mtp_loss(
    hidden_states: Tensor,
    labels: Tensor | None,
    loss_mask: MTPTargets | None,
    output_layer: Callable[..., tuple[Tensor, Any]],
    output_weight: Tensor | None,
    runtime_gather_output: bool | None,
    is_training: bool,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    config: TransformerConfig,
    **unused: Any,
) -> Tensor:
    """Splits main from MTP hidden states and attaches the MTP loss to the main ones' backward pass.

    hidden_states [2 * s, b, h] (main, then MTP, along the sequence) -> main [s, b, h]. Without labels (generation) only
    the split happens.
    """
    main, predicted = torch.chunk(hidden_states, 2, dim=0)
    if labels is None or loss_mask is None:
        return main
    targets = loss_mask
    logits, _ = output_layer(predicted, weight=output_weight, runtime_gather_output=runtime_gather_output)
    losses = compute_language_model_loss(targets.labels, logits) * targets.mask  # [b, s]
    targets.loss_sum = losses.detach().sum()
    weight = (config.mtp_loss_scaling_factor or 0.0) * targets.weight
    return MTPLossAutoScaler.apply(main, weight * losses)


def install() -> None:
    """Puts `process_mtp_loss` in Megatron-core's place, on every platform."""
    rebind(MTP_LOSS, process_mtp_loss)
