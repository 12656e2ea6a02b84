"""Whole matrices to the equal shares of a buffer that data-parallel ranks own (ZeRO-1 under Muon); without torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


def newton_schulz_cost(rows: int, columns: int) -> int:
    """Multiplications of one Newton-Schulz iteration on a matrix: 2m^2n + m^3 for m x n, m <= n."""
    small, large = sorted((rows, columns))
    return 2 * small * small * large + small**3


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
