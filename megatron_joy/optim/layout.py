"""Where parameters lie in the buffers whose equal shares data-parallel ranks own (ZeRO-1).

AdamW works element by element, so a share may end anywhere. Muon needs whole matrices: those of a buffer are placed so
that no share ends inside one, balanced by what Newton-Schulz costs. Megatron-core's buffers, reductions and gathers
take any layout; only the layout is ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.param_layout import FullParamLayout, PerBufferParamLayout, bucket_end_divisor

from megatron_joy.optim.split import matrices_of

ON_MUON = "is_managed_by_layer_wise_optimizer"  # Megatron-core's mark; its buffers hold marked or unmarked, never both
ALIGNED = 64  # elements; Megatron-core starts every parameter at a multiple
SLACK = 1.05  # of an even share: room that lets costs be balanced, not sizes alone


@dataclass(frozen=True)
class Item:
    """A parameter to place: `count` matrices of `size` elements, of `cost` in sum; `splittable` between matrices."""

    count: int
    size: int
    cost: int
    splittable: bool

    @property
    def elements(self) -> int:
        """All of it."""
        return self.count * self.size


@dataclass(frozen=True)
class Placement:
    """First element of each item in a buffer of `shards` shares of `share` elements, and each share's cost."""

    starts: tuple[int, ...]
    share: int
    costs: tuple[float, ...]


def place(items: Sequence[Item], shards: int, divisor: int) -> Placement:
    """Whole matrices to shares, deterministically: stacked experts in a row from the front, then the dearest first.

    A share is a multiple of `divisor` and of every splittable item's matrix, so that its ends fall between matrices.
    """
    granule = math.lcm(divisor, ALIGNED, *(item.size for item in items if item.splittable))
    least = max((item.elements for item in items if not item.splittable), default=0)
    total = sum(_up(item.elements, ALIGNED) for item in items)
    share = _up(max(least, math.ceil(total / shards * (SLACK if shards > 1 else 1))), granule)
    while True:
        placed = _try(items, shards, share)
        if placed is not None:
            return placed
        share = _up(math.ceil(share * 1.02) + 1, granule)


def _try(items: Sequence[Item], shards: int, share: int) -> Placement | None:
    starts, costs, used = [0] * len(items), [0.0] * shards, [0] * shards
    cursor = 0
    for index, item in enumerate(items):
        if item.splittable:
            cursor = _up(cursor, math.lcm(item.size, ALIGNED))
            starts[index], end = cursor, cursor + item.elements
            if end > shards * share:
                return None
            for shard in range(cursor // share, -(-end // share)):
                inside = min(end, (shard + 1) * share) - max(cursor, shard * share)
                costs[shard] += item.cost * inside / item.elements
                used[shard] = min(end, (shard + 1) * share) - shard * share
            cursor = end
    whole = [index for index, item in enumerate(items) if not item.splittable]
    for index in sorted(whole, key=lambda index: (-items[index].cost, index)):
        room = [s for s in range(shards) if _up(used[s], ALIGNED) + items[index].elements <= share]
        if not room:
            return None
        shard = min(room, key=lambda s: (costs[s], s))
        start = _up(used[shard], ALIGNED)
        starts[index], used[shard] = shard * share + start, start + items[index].elements
        costs[shard] += items[index].cost
    return Placement(tuple(starts), share, tuple(costs))


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


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
    items = [Item(m.count, m.size, m.cost, m.splittable) for m in (found[param] for param in params)]
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
