"""All local routed experts as one grouped matrix product per projection.

Letters: T routed tokens on this rank (sorted by expert), E local experts, h hidden, f expert width (over ETP).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PortableGroupedExperts(MegatronModule):
    """SwiGLU experts with stacked weights: fc1 [E, 2f, h] (gate rows, then up rows), fc2 [E, h, f].

    `torch.nn.functional.grouped_mm` is the one code path of CPUs and GPUs. Checkpoints have the keys and global shapes
    of Megatron-core's SequentialMLP and TEGroupedMLP, so either can read what the other wrote.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: Any,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.ep_group, self.etp_group = pg_collection.ep, pg_collection.expt_tp
        self.expert_dp_group = pg_collection.expt_dp
        self.num_local_experts = num_local_experts
        width = config.moe_ffn_hidden_size // self.etp_group.size()
        self.linear_fc1 = self._parameter((num_local_experts, 2 * width, config.hidden_size), 1, config.init_method)
        self.linear_fc2 = self._parameter(
            (num_local_experts, config.hidden_size, width), 2, config.output_layer_init_method
        )

    def _parameter(self, shape: tuple[int, ...], partition_dim: int, init_method: Any) -> torch.nn.Parameter:
        device = torch.device("meta") if self.config.init_model_with_meta_device else None
        weight = torch.nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=partition_dim, stride=1)
        if self.config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()), torch.no_grad():
                init_method(weight)
        # Without this mark gradients are reduced over the dense data-parallel ranks; experts have others as soon as
        # they are spread over ranks or split differently from dense matrices (the rule of ColumnParallelLinear).
        etp, tp = self.config.expert_tensor_parallel_size, self.config.tensor_model_parallel_size
        weight.allreduce = self.config.expert_model_parallel_size <= 1 and etp == tp  # type: ignore[attr-defined]
        return weight

    def forward(
        self, permuted_tokens: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """permuted_tokens [T, h], tokens_per_expert int [E], permuted_probs [T] -> ([T, h], no bias)."""
        if permuted_tokens.shape[0] == 0:
            # grouped_mm has no backward pass for no tokens. All three inputs take part all the same: the weights
            # because their gradients are reduced, tokens and probabilities because other ranks wait for their
            # all-to-alls in the backward pass.
            nothing = permuted_tokens * permuted_probs.unsqueeze(-1).to(permuted_tokens.dtype)
            return nothing + 0.0 * (self.linear_fc1.sum() + self.linear_fc2.sum()), None
        ends = torch.as_tensor(tokens_per_expert, device=permuted_tokens.device).cumsum(0).to(torch.int32)  # [E]
        inner = self.product(permuted_tokens, self.linear_fc1, ends)  # [T, 2f]
        gate, up = inner.chunk(2, dim=-1)
        hidden = F.silu(gate) * up * permuted_probs.unsqueeze(-1).to(inner.dtype)  # [T, f]
        # grouped_mm refuses the expanded gradient that some reductions hand back; the clone makes it contiguous.
        return _ContiguousGradient.apply(self.product(hidden, self.linear_fc2, ends)), None

    def product(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """x [T, in] sorted by expert, weight [E, out, in], ends int32 [E] (last rows plus one) -> [T, out]."""
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)

    def backward_dw(self) -> None:
        """Weight gradients are never delayed here."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Entries '<prefix>experts.linear_fc{1,2}.weight' of global shape [experts, out, in]."""
        entries: dict[str, Any] = {}
        for attribute, axis in (("linear_fc1", 1), ("linear_fc2", 2)):
            key, weight = f"{prefix}experts.{attribute}.weight", getattr(self, attribute)
            split = self.etp_group.size() > 1 and attribute == "linear_fc1"
            entries[f"{prefix}{attribute}"] = (
                self._gate_up_factory(key, weight, sharded_offsets)
                if split
                else self._sharded(key, weight, sharded_offsets, (axis, self.etp_group.rank(), self.etp_group.size()))
            )
        return entries

    def _sharded(
        self, key: str, data: Tensor, outer: tuple[Any, ...], tensor_offset: tuple[int, int, int]
    ) -> ShardedTensor:
        experts = (len(outer), self.ep_group.rank(), self.ep_group.size())
        axis, rank, parts = tensor_offset
        offsets = (*outer, experts, (len(outer) + axis, rank, parts))
        return ShardedTensor.from_rank_offsets(
            key, data, *offsets, replica_id=(0, 0, self.expert_dp_group.rank()), prepend_axis_num=len(outer)
        )

    def _gate_up_factory(self, key: str, weight: Tensor, outer: tuple[Any, ...]) -> ShardedTensorFactory:
        """With expert tensor parallelism a rank's rows are a part of gate and a part of up: two pieces, not one."""
        rank, size = self.etp_group.rank(), self.etp_group.size()

        def build(key: str, data: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
            gate, up = data.chunk(2, dim=1)
            return [
                self._sharded(key, gate, outer, (1, rank, 2 * size)),
                self._sharded(key, up, outer, (1, size + rank, 2 * size)),
            ]

        def merge(pieces: list[Tensor]) -> Tensor:
            return torch.cat(pieces, dim=1)

        return ShardedTensorFactory(key, weight, build, merge, replica_id=(0, 0, self.expert_dp_group.rank()))


class _ContiguousGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()
