"""Expert load and data composition over a run, gathered row by row into a bounded number of buckets of steps."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_joy.report import heat

LOAD_CELLS = 900_000
"""Cells (buckets x layers x experts) the heat maps of one report may have: about a megabyte in the page."""
LOAD_BUCKETS = (48, 320)
SOURCE_BUCKETS = 80
"""Few, because a step has few samples of a small source: narrower bands would show chance, not composition."""
TAIL_SHARE = 0.05
TAIL_STEPS = 20
"""The last part of a run that "now" means: so much of its steps, and at least so many, for a step's load is noisy."""
_BATCH = 256


def bucket_edges(first: int, last: int, buckets: int) -> NDArray[np.int64]:
    """Bounds of at most `buckets` equal spans of steps first..last: bucket b has the steps in [edge[b], edge[b+1])."""
    count = max(1, min(buckets, last - first + 1))
    return np.rint(np.linspace(first, last + 1, count + 1)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class LoadHistory:
    """Expert load as ratios to the fair share (1 = an even load), B buckets, L MoE layers, E experts.

    Attributes:
        edges: [B + 1] int64 steps.
        ratio: [B, L, E] float32, mean over the bucket's steps; NaN for a bucket without rows.
        imbalance: [B, L] float64, mean over the bucket's steps of the busiest expert's ratio.
        peak: [B, L] float64, the largest such ratio in the bucket.
        tail_ratio: [L, E] float64, mean over the last steps (TAIL_SHARE, TAIL_STEPS).
        tail_imbalance: [L] float64, mean over the same steps of the busiest expert's ratio.
        tail_first_step: where these last steps begin.
        skipped: rows whose load had another shape than the first one's.
    """

    edges: NDArray[np.int64]
    ratio: NDArray[np.float32]
    imbalance: NDArray[np.float64]
    peak: NDArray[np.float64]
    tail_ratio: NDArray[np.float64]
    tail_imbalance: NDArray[np.float64]
    tail_first_step: int
    skipped: int

    @property
    def dead(self) -> list[tuple[int, int]]:
        """(MoE layer, expert) of those that got less than a hundredth of their share in the last steps."""
        return [(int(i), int(e)) for i, e in np.argwhere(self.tail_ratio < heat.DEAD_RATIO)]

    @property
    def overloaded(self) -> list[tuple[int, int]]:
        """(MoE layer, expert) of those that got over twice their share in the last steps."""
        return [(int(i), int(e)) for i, e in np.argwhere(self.tail_ratio > heat.OVERLOADED_RATIO)]


class LoadAccumulator:
    """Adds expert loads of single steps into a LoadHistory. Batched, because numpy calls cost more than the sums."""

    def __init__(self, first_step: int, last_step: int) -> None:
        self._span = first_step, last_step
        tail = max(TAIL_STEPS, round(TAIL_SHARE * (last_step - first_step + 1)))
        self._tail_first = max(first_step, last_step + 1 - tail)
        self._shape: tuple[int, int] | None = None
        self._steps: list[int] = []
        self._loads: list[list[list[float]]] = []
        self._skipped = 0

    def add(self, step: int, load: list[list[float]]) -> None:
        """Adds one step's load, [L][E] shares of routed tokens, each layer's summing to 1."""
        shape = len(load), len(load[0])
        if self._shape is None:
            self._begin(shape)
        if shape != self._shape or any(len(layer) != shape[1] for layer in load):
            self._skipped += 1
            return
        self._steps.append(step)
        self._loads.append(load)
        if len(self._steps) == _BATCH:
            self._flush()

    def _begin(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        layers, experts = shape
        low, high = LOAD_BUCKETS
        self._edges = bucket_edges(*self._span, min(high, max(low, LOAD_CELLS // (layers * experts))))
        buckets = len(self._edges) - 1
        self._count = np.zeros(buckets)
        self._sum = np.zeros((buckets, layers, experts))
        self._imbalance = np.zeros((buckets, layers))
        self._peak = np.zeros((buckets, layers))
        self._tail = np.zeros(shape)
        self._tail_imbalance = np.zeros(layers)
        self._tail_count = 0

    def _flush(self) -> None:
        if not self._steps:
            return
        steps = np.array(self._steps)  # [b]
        ratio = np.nan_to_num(np.array(self._loads, np.float64)) * self._sum.shape[2]  # [b, L, E]
        worst = ratio.max(axis=2)  # [b, L]
        where = np.searchsorted(self._edges, steps, side="right") - 1
        for bucket in np.unique(where):
            mine = where == bucket
            self._count[bucket] += mine.sum()
            self._sum[bucket] += ratio[mine].sum(axis=0)
            self._imbalance[bucket] += worst[mine].sum(axis=0)
            self._peak[bucket] = np.maximum(self._peak[bucket], worst[mine].max(axis=0))
        late = steps >= self._tail_first
        self._tail += ratio[late].sum(axis=0)
        self._tail_imbalance += worst[late].sum(axis=0)
        self._tail_count += int(late.sum())
        self._steps, self._loads = [], []

    def finish(self) -> LoadHistory | None:
        """The history, or None when no row had a load."""
        if self._shape is None:
            return None
        self._flush()
        with np.errstate(invalid="ignore"):
            ratio = (self._sum / self._count[:, None, None]).astype(np.float32)
            imbalance = self._imbalance / self._count[:, None]
        tail = self._tail_count or np.nan
        return LoadHistory(
            edges=self._edges,
            ratio=ratio,
            imbalance=imbalance,
            peak=np.where(self._count[:, None] > 0, self._peak, np.nan),
            tail_ratio=self._tail / tail,
            tail_imbalance=self._tail_imbalance / tail,
            tail_first_step=self._tail_first,
            skipped=self._skipped,
        )


@dataclass(frozen=True, slots=True)
class SourceHistory:
    """Samples per data source, B buckets, S sources.

    Attributes:
        edges: [B + 1] int64 steps.
        names: S sources, the largest first.
        samples: [B, S] float64 samples in the bucket's steps.
        total: [S] float64 samples over the whole run.
    """

    edges: NDArray[np.int64]
    names: list[str]
    samples: NDArray[np.float64]
    total: NDArray[np.float64]


class SourceAccumulator:
    """Adds the sources of single steps into a SourceHistory."""

    def __init__(self, first_step: int, last_step: int) -> None:
        self._edges = bucket_edges(first_step, last_step, SOURCE_BUCKETS)
        self._samples: dict[str, NDArray[np.float64]] = {}
        self._bounds: list[int] = self._edges.tolist()
        self._bucket = 0

    def add(self, step: int, sources: dict[str, float]) -> None:
        """Adds one step's samples per source name."""
        while self._bucket + 2 < len(self._bounds) and step >= self._bounds[self._bucket + 1]:
            self._bucket += 1
        while self._bucket > 0 and step < self._bounds[self._bucket]:
            self._bucket -= 1
        for name, samples in sources.items():
            if name not in self._samples:
                self._samples[name] = np.zeros(len(self._bounds) - 1)
            self._samples[name][self._bucket] += samples

    def finish(self) -> SourceHistory | None:
        """The history, or None when no row named its sources."""
        if not self._samples:
            return None
        names = sorted(self._samples, key=lambda name: (-self._samples[name].sum(), name))
        samples = np.stack([self._samples[name] for name in names], axis=1)
        return SourceHistory(self._edges, names, samples, samples.sum(axis=0))
