"""Where parameters lie in the buffers whose equal shares data-parallel ranks own (ZeRO-1).

AdamW works element by element, so a share may end anywhere. Muon needs whole matrices: those of a buffer are placed so
that no share ends inside one, balanced by what Newton-Schulz costs. Megatron-core's buffers, reductions and gathers
take any layout; only the layout is ours.
"""

import math
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.param_layout import FullParamLayout, PerBufferParamLayout, bucket_end_divisor

from megatron_joy.optim.split import matrices_of
from megatron_joy.parallel.placement import Item, place

ON_MUON = "is_managed_by_layer_wise_optimizer"  # Megatron-core's mark; its buffers hold marked or unmarked, never both


def buffer_layout(
    chunk: Any, groups: Any, config: DistributedDataParallelConfig, with_muon: bool = False
) -> FullParamLayout:
    """The layout of a chunk's buffers; with Muon its matrices are marked and have buffers of their own."""
    named = list(chunk.named_parameters())
    found = {param: matrices_of(name, param, groups) for name, param in named} if with_muon else {}
    for param, matrices in found.items():
        setattr(param, ON_MUON, matrices is not None)
    layout = DistributedOptimizer.compute_full_param_layout(
        [param for _, param in named],
        bucket_size=None,
        data_parallel_world_size=groups.intra_dp_cp.size(),
        ddp_config=config,
        expert_data_parallel_world_size=groups.intra_expt_dp.size(),
    )
    for key, flat in layout.layouts.items():
        if key.is_managed_by_layer_wise_optimizer:
            shards = (groups.intra_expt_dp if key.is_expert_parallel else groups.intra_dp_cp).size()
            layout.layouts[key] = _of_matrices(flat, found, shards, config)
    return layout


def _of_matrices(
    flat: PerBufferParamLayout, found: dict[Any, Any], shards: int, config: DistributedDataParallelConfig
) -> PerBufferParamLayout:
    params = list(flat.param_index_map)
    items = tuple(Item(m.count, m.size, m.cost, m.splittable) for m in (found[param] for param in params))
    divisor = bucket_end_divisor(shards, config.pad_buckets_for_high_nccl_busbw)
    placed = place(items, shards, divisor // math.gcd(divisor, shards))
    ends = (start + item.elements for start, item in zip(placed.starts, items, strict=True))
    return PerBufferParamLayout(
        param_index_map={param: (start, end, 0) for param, start, end in zip(params, placed.starts, ends, strict=True)},
        bucket_indices=[(0, shards * placed.share)],
        per_bucket_numel_unpadded=[sum(item.elements for item in items)],
        param_indices=flat.param_indices,
        num_optimizer_shards=shards,
    )
