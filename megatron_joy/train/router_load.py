"""How many tokens each expert got in a step, over all ranks, by layer."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_joy.platform.process import Process


class RouterLoad:
    """Reads the routers' own counters just before Megatron-core uses and clears them."""

    def __init__(self, chunks: Sequence[Any], process: Process) -> None:
        self.process = process
        self.routers = [
            (module.layer_number, module)
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, TopKRouter)
        ]
        self._counts: Tensor | None = None

    def collect(self) -> None:
        """Keeps this rank's counts of the step: [local MoE layers, experts]."""
        if self.routers:
            self._counts = torch.stack([router.local_tokens_per_expert.clone() for _, router in self.routers])

    def biases(self) -> list[Tensor]:
        """Copies of this rank's router biases."""
        return [router.expert_bias.clone() for _, router in self.routers]

    def put_back(self, biases: Sequence[Tensor]) -> None:
        """Undoes what a step did to the routers: biases as they were, no tokens counted."""
        for (_, router), bias in zip(self.routers, biases, strict=True):
            router.expert_bias.copy_(bias)
            router.local_tokens_per_expert.zero_()

    def gather(self) -> Tensor | None:
        """Shares [moe layers, experts] of the last step in model order, each row summing to 1; None but on rank 0."""
        if self._counts is not None:
            dist.all_reduce(self._counts, group=self.process.groups.tp_dp_cp)
        mine = [] if self._counts is None else list(zip([n for n, _ in self.routers], self._counts.cpu(), strict=True))
        pp = self.process.groups.pp
        stages: list[Any] = [None] * pp.size()
        if pp.size() > 1:
            dist.all_gather_object(stages, mine, group=pp)
        else:
            stages = [mine]
        if not self.process.is_first_rank:
            return None
        layers = sorted((entry for stage in stages for entry in stage), key=lambda entry: entry[0])
        if not layers:
            return None
        counts = torch.stack([count for _, count in layers]).float()
        return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
