"""The sequence-wise balance loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20), exact in any layout.

For a row of T tokens, E experts and K of them for a token, with scores s of the router (its bias left out):

    f_i = E / (K T) * number of tokens that have i among the K highest scores
    P_i = 1 / T * sum over tokens of s_i / sum_j s_j
    loss = alpha * sum_i f_i P_i, of which a step has the mean over its rows, added up over MoE layers

An even load gives alpha per layer. Megatron-core's own form takes all rows of a packed micro-batch for one sequence, so
it would depend on the micro-batch's size.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_joy.model.places import token_places


@dataclass
class SequenceBalance:
    """What all routers of a rank share in a step: what a row is, what the loss weighs, and its sum so far."""

    factor: float  # alpha
    groups: ProcessGroupCollection
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # of each local token, [t]
    count: int = 0  # rows of a micro-batch
    length: int = 0
    weight: float = 0.0  # what a row's loss enters the backward pass with
    total: float | Tensor = 0.0  # of this rank's tokens, alpha included

    def begin(self, count: int, length: int, weight: float, device: torch.device) -> None:
        """A step of micro-batches of `count` rows begins."""
        if (count, length) != (self.count, self.length):
            self.rows = token_places(count, length, self.groups).flatten().to(device) // length
            self.count, self.length = count, length
        self.weight, self.total = weight, 0.0

    def loss(self, scores: Tensor, top: int) -> Tensor:
        """scores [t, E] fp32 of this rank's tokens -> fp32 scalar: their part of the micro-batch's sum over rows."""
        experts = scores.shape[1]
        chosen = torch.zeros_like(scores).scatter_(1, scores.detach().topk(top, dim=1).indices, 1.0)  # [t, E]
        counts = scores.new_zeros(self.count, experts).index_add_(0, self.rows, chosen)
        if self.groups.tp_cp.size() > 1:
            dist.all_reduce(counts, group=self.groups.tp_cp)
        shares = scores / scores.sum(-1, keepdim=True)
        means = scores.new_zeros(self.count, experts).index_add(0, self.rows, shares) / self.length
        frequencies = counts * (experts / (top * self.length))
        return self.factor * (frequencies * means).sum()


class BalancedRouter(TopKRouter):
    """Megatron-core's router; with a `balance` it adds the loss to the backward pass of its weights."""

    balance: SequenceBalance | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> Any:
        """logits [s, b, E] -> (weights [t, E], chosen [t, E] bool); evaluation and recomputation add nothing."""
        probs, chosen = super().routing(logits, padding_mask)
        balance = self.balance
        if balance is None or not (self.training and torch.is_grad_enabled()):
            return probs, chosen
        scores = torch.sigmoid(logits.view(-1, logits.shape[-1]).float())
        loss = balance.loss(scores, self.topk)
        balance.total = balance.total + loss.detach()
        return MoEAuxLossAutoScaler.apply(probs, loss * balance.weight), chosen


def balanced(chunks: Any, factor: float, groups: ProcessGroupCollection) -> SequenceBalance | None:
    """Gives all routers of a rank's chunks one balance; None without a factor."""
    if factor == 0:
        return None
    balance = SequenceBalance(factor, groups)
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, BalancedRouter):
                module.balance = balance
    return balance
