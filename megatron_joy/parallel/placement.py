"""Whole matrices to the equal shares of a buffer that data-parallel ranks own (ZeRO-1 under Muon); without torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

ALIGNED = 64  # elements; Megatron-core starts every parameter at a multiple
SLACK = 1.05  # of an even share: room that lets costs be balanced, not sizes alone


@dataclass(frozen=True)
class Item:
    """A parameter to place: `count` matrices of `size` elements, of `cost` in sum; `splittable` between any two.

    Two matrices, gate and up, may lie in neighbouring shares in any case.
    """

    count: int
    size: int
    cost: int
    splittable: bool

    @property
    def elements(self) -> int:
        """All of it."""
        return self.count * self.size

    @property
    def least(self) -> int:
        """Elements that have to lie in one share."""
        pair = self.count == 2 and self.size % ALIGNED == 0  # the second begins a share, so the first is aligned too
        return self.size if pair else self.elements


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


# A planner asks for the same placement with every sequence length and every setting of recomputation.
@lru_cache(maxsize=4096)
def place(items: tuple[Item, ...], shards: int, divisor: int) -> Placement:
    """Whole matrices to shares, deterministically: stacked experts in a row from the front, then the dearest first.

    A gate and an up that are longer than a share together lie on both sides of a share's end.

    A share is a multiple of `divisor` and of every splittable item's matrix, so that its ends fall between matrices.
    """
    granule = math.lcm(divisor, ALIGNED, *(item.size for item in items if item.splittable))
    least = max((item.least for item in items if not item.splittable), default=0)
    total = sum(_up(item.elements, ALIGNED) for item in items)
    share = _up(max(least, math.ceil(total / shards * (SLACK if shards > 1 else 1))), granule)
    while True:
        placed = _try(items, shards, share)
        if placed is not None:
            return placed
        share = _up(math.ceil(share * 1.02) + 1, granule)


def _try(items: Sequence[Item], shards: int, share: int) -> Placement | None:
    room = _Room(items, share, [0] * len(items), [0.0] * shards, [0] * shards, [share] * shards)
    return Placement(tuple(room.starts), share, tuple(room.costs)) if room.take_all() else None


@dataclass(frozen=True)
class _Room:
    """What is left of each share: from `used` to `free`; filled in place."""

    items: Sequence[Item]
    share: int
    starts: list[int]
    costs: list[float]
    used: list[int]
    free: list[int]

    def take_all(self) -> bool:
        """Whether everything finds a place."""
        front = self._take_stacked()
        if front is None or not self._take_wide(-(-front // self.share)):
            return False
        whole = [i for i, item in enumerate(self.items) if not item.splittable and item.elements <= self.share]
        return all(self._take(index) for index in sorted(whole, key=lambda index: (-self.items[index].cost, index)))

    def _take_stacked(self) -> int | None:
        """In a row from the front, over the ends of shares; the row's end, None if it is too long."""
        cursor, share = 0, self.share
        for index, item in enumerate(self.items):
            if not item.splittable:
                continue
            cursor = _up(cursor, math.lcm(item.size, ALIGNED))
            self.starts[index], end = cursor, cursor + item.elements
            if end > len(self.used) * share:
                return None
            for shard in range(cursor // share, -(-end // share)):
                inside = min(end, (shard + 1) * share) - max(cursor, shard * share)
                self.costs[shard] += item.cost * inside / item.elements
                self.used[shard] = _up(min(end, (shard + 1) * share) - shard * share, ALIGNED)
            cursor = end
        return cursor

    def _take_wide(self, shard: int) -> bool:
        """Pairs that no share holds: from `shard` on, where nothing is, one at a share's end and one behind it."""
        for index, item in enumerate(self.items):
            if item.splittable or item.elements <= self.share:
                continue
            if shard + 1 >= len(self.used):
                return False
            self.starts[index] = (shard + 1) * self.share - item.size
            self.free[shard], self.used[shard + 1] = self.share - item.size, item.size
            self.costs[shard : shard + 2] = [item.cost / 2] * 2
            shard += 2
        return True

    def _take(self, index: int) -> bool:
        """A whole item to the first of the shares with the least cost among those with room."""
        size, found = self.items[index].elements, None
        for shard, (cost, end, free) in enumerate(zip(self.costs, self.used, self.free, strict=True)):
            if end + size <= free and (found is None or cost < self.costs[found]):
                found = shard
        if found is None:
            return False
        self.starts[index], self.used[found] = (
            found * self.share + self.used[found],
            _up(self.used[found] + size, ALIGNED),
        )
        self.costs[found] += self.items[index].cost
        return True


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
