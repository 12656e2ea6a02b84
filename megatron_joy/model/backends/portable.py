"""Building blocks in plain torch: the reference, the CPU's path, and a path of GPUs without Transformer Engine."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_joy.model.backends.blocks import Blocks
from megatron_joy.model.backends.portable_attention import PortableAttention
from megatron_joy.model.backends.portable_experts import PortableGroupedExperts
from megatron_joy.platform.process import tensor_parallel_group


def _device(config: TransformerConfig) -> torch.device:
    if config.init_model_with_meta_device:
        return torch.device("meta")
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class PortableNorm(torch.nn.Module):
    """RMSNorm over the last dimension that allows sequence parallelism, which Megatron-core's torch norm refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size]."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class PortableLinear(torch.nn.Module):
    """The same whole matrix on every tensor-parallel rank, for MLA's down projections.

    A column-parallel one would be wrong: the shared rotary key goes into every rank's heads, so its gradient must be
    summed over ranks, not split. Under sequence parallelism each rank sees its own tokens and Megatron-core sums the
    weight's gradient over TP because the weight is marked; without it all ranks have the same tokens but only their own
    heads' gradients, and the sum over TP is needed all the same.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None = None,
        config: TransformerConfig,
        init_method: Any,
        bias: bool = False,
        **unused: Any,
    ) -> None:
        super().__init__()
        if parallel_mode != "duplicated" or bias:
            raise ValueError(f"PortableLinear is a duplicated linear without bias, not {parallel_mode=} {bias=}")
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=_device(config))
        )
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()), torch.no_grad():
                init_method(self.weight)
        self.weight.allreduce = True  # type: ignore[attr-defined]
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [..., input_size] -> ([..., output_size], no bias)."""
        return F.linear(x, self.weight), None

    def backward_dw(self) -> None:
        """Weight gradients are never delayed here."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One whole tensor; TP rank 0 has the main copy."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            None,
            sharded_offsets,
            tp_group=tensor_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


BLOCKS = Blocks(
    name="portable",
    column_linear=ColumnParallelLinear,
    row_linear=RowParallelLinear,
    duplicated_linear=PortableLinear,
    norm=PortableNorm,
    core_attention=PortableAttention,
    grouped_experts=PortableGroupedExperts,
)
