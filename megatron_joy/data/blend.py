"""Which source sample k of a run comes from: a pure function of k and of the blend's history.

Weights become whole numbers of slots in a cycle. Slots are handed out so that in every prefix of the run each source
has had its exact share to within one sample. Since a cycle is the same every time, sample k is found by one division
and two look-ups; memory is one cycle (at most CYCLE_LIMIT slots) for any number of samples.

A blend that changes in mid-run is a list of segments. Each source goes on where the segment before left it, so a change
neither loses nor repeats a sample of any source.
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megatron_joy.errors import UserError

CYCLE_LIMIT = 100_000


@dataclass(frozen=True)
class BlendSegment[K: Hashable]:
    """From sample `start` of the run on, sources are drawn by `weights` (source -> share, need not sum to 1).

    A source is whatever is read in an order of its own: of a text that is read at two lengths each length is one.
    """

    start: int
    weights: Mapping[K, float]


def cycle_counts[K: Hashable](weights: Mapping[K, float], limit: int = CYCLE_LIMIT) -> list[int]:
    """Slots of each source in one cycle, in the order of `weights`.

    Exact where the weights, read as the decimal numbers they print as, fit a cycle of at most `limit` slots (0.7 and
    0.3: 7 and 3). Otherwise `limit` slots by largest remainder, which puts no share off by 1/limit. Raises UserError
    for a source that gets no slot.
    """
    shares = [Fraction(repr(float(weight))) for weight in weights.values()]
    scale = math.lcm(*(share.denominator for share in shares))
    exact = [int(share * scale) for share in shares]
    divisor = math.gcd(*exact)
    counts = [count // divisor for count in exact]
    if sum(counts) > limit:
        total = sum(exact)
        counts = [count * limit // total for count in exact]
        remainders = sorted(range(len(exact)), key=lambda i: (-(exact[i] * limit % total), i))
        for i in remainders[: limit - sum(counts)]:
            counts[i] += 1
    for (name, weight), count in zip(weights.items(), counts, strict=True):
        if count == 0:
            raise UserError(
                f"blend: source {name} has weight {weight:g} of {sum(weights.values()):g}, less than one sample in "
                f"{limit}; raise its weight or leave it out"
            )
    return counts


def interleave(counts: Sequence[int]) -> npt.NDArray[np.int32]:
    """The source of each slot, int32 [sum of counts], so that no prefix is off by a sample or more.

    Of n slots, source s with c of them owns occurrence j (from 0) in the window from floor(j n / c) up to, not with,
    ceil((j + 1) n / c). Always serving the open window that closes first misses none, and then the count of s in the
    first r slots differs from r c / n by less than 1 (Baruah, Cohen, Plaxton, Varvel: Proportionate Progress,
    Algorithmica 15, 1996; windows of a single processor).
    """
    slots, sources = sum(counts), len(counts)
    each = [np.arange(count, dtype=np.int64) for count in counts]
    opens = np.concatenate([j * slots // len(j) for j in each])
    closes = np.concatenate([-(-(j + 1) * slots // len(j)) for j in each])
    urgency = closes * sources + np.repeat(np.arange(sources), counts)  # one int orders by closing, then by source
    queue = urgency[np.argsort(opens, kind="stable")].tolist()
    opened = np.searchsorted(np.sort(opens), np.arange(slots), side="right").tolist()
    ready: list[int] = []
    order, taken = [0] * slots, 0
    for slot, until in enumerate(opened):
        for window in queue[taken:until]:
            heapq.heappush(ready, window)
        order[slot], taken = heapq.heappop(ready) % sources, until
    return np.array(order, dtype=np.int32)


class _Cycle[K: Hashable]:
    """One segment made ready: slot -> (source, occurrence), and how many readings each source had before it."""

    def __init__(self, segment: BlendSegment[K], before: Mapping[K, int]) -> None:
        self.start = segment.start
        self.names = list(segment.weights)
        self.before = dict(before)
        self.counts = cycle_counts(segment.weights)
        self.slots = interleave(self.counts)
        self.of_source = [np.flatnonzero(self.slots == source) for source in range(len(self.names))]
        self.occurrence = np.empty(len(self.slots), dtype=np.int64)
        for places in self.of_source:
            self.occurrence[places] = np.arange(len(places))

    def locate(self, k: int) -> tuple[K, int]:
        cycle, slot = divmod(k - self.start, len(self.slots))
        source = int(self.slots[slot])
        name = self.names[source]
        return name, self.before.get(name, 0) + cycle * self.counts[source] + int(self.occurrence[slot])

    def readings_before(self, k: int) -> dict[K, int]:
        """How often each source that ever had a share was read in samples [0, k)."""
        cycle, slot = divmod(k - self.start, len(self.slots))
        partial = np.bincount(self.slots[:slot], minlength=len(self.names))
        totals = dict(self.before)
        for source, name in enumerate(self.names):
            totals[name] = totals.get(name, 0) + cycle * self.counts[source] + int(partial[source])
        return totals

    def sample_of(self, name: K, reading: int) -> int | None:
        """The sample that is `reading` of the source if this segment went on for ever; None where it is before it."""
        if name not in self.names or reading < self.before.get(name, 0):
            return None
        source = self.names.index(name)
        cycle, occurrence = divmod(reading - self.before.get(name, 0), self.counts[source])
        return self.start + cycle * len(self.slots) + int(self.of_source[source][occurrence])


class Blend[K: Hashable]:
    """k -> (source, reading of that source), for the whole history of a run's blends.

    segments: ascending by start, the first at 0. Raises ValueError when they are not, UserError as `cycle_counts`.
    """

    def __init__(self, segments: Sequence[BlendSegment[K]]) -> None:
        starts = [segment.start for segment in segments]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"segments start at {starts}; expected 0 first, then ascending")
        self._starts = starts
        self._cycles: list[_Cycle[K]] = []
        before: dict[K, int] = {}
        for segment in segments:
            if self._cycles:
                before = self._cycles[-1].readings_before(segment.start)
            self._cycles.append(_Cycle(segment, before))

    def _at(self, k: int) -> _Cycle[K]:
        if k < 0:
            raise IndexError(f"sample {k}; samples count from 0")
        return self._cycles[bisect_right(self._starts, k) - 1]

    def locate(self, k: int) -> tuple[K, int]:
        """Sample k's source and the number of this reading of it, both from 0."""
        return self._at(k).locate(k)

    def readings_before(self, k: int) -> dict[K, int]:
        """How often each source was read in samples [0, k)."""
        return self._at(k).readings_before(k)

    def sample_of(self, name: K, reading: int) -> int | None:
        """The sample that is `reading` of a source (the inverse of `locate`); None when the run never gets there."""
        ends: list[float] = [*self._starts[1:], math.inf]
        for cycle, end in zip(self._cycles, ends, strict=True):
            sample = cycle.sample_of(name, reading)
            if sample is not None and sample < end:
                return sample
        return None

    def description(self) -> list[tuple[int, list[tuple[K, int]]]]:
        """What determines the blend: of each segment its start, and each source's slots in the cycle."""
        return [(cycle.start, list(zip(cycle.names, cycle.counts, strict=True))) for cycle in self._cycles]
