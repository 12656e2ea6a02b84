"""From signatures to clusters, out of core: candidates by bands, exact verification, union-find, one document kept.

1. Every document's band keys are sorted externally; documents with an equal key are candidates.
2. Candidates' signatures are compared: a pair far below the threshold (4 standard deviations) goes.
3. The exact Jaccard similarity of the rest is computed from their shingle sets; pairs at or above the threshold are
   edges.
4. Union-find over the edges; its array is a file of 8 bytes for each document.
5. Of each cluster one document is kept: all documents of existing parts are kept, and if there is one, no other; else
   the one with the highest score, of equals the longest text, of equals the smallest number (order of the inputs).
What comes out depends on the parts and their order alone. Memory: `memory_rows` rows of 16 bytes a few times over.
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.dedup.bands import BANDS, band_keys
from data_pipeline.dedup.external import MEMORY_ROWS, Rows, RowSorter, group_starts, rows_of
from data_pipeline.dedup.minhash import Numbers, agreement, jaccard_of_rows
from data_pipeline.dedup.store import Store
from data_pipeline.native.library import kernels

THRESHOLD = 0.9
# Of a larger group of equal keys each document is compared with this many that follow and with the group's first:
# the work stays linear, and a document has as many chances as it has bands.
NEIGHBOURS = 64
READ_ROWS = 65_536  # documents or pairs whose signatures are in memory together
SET_HASHES = 8_000_000  # shingle hashes in memory together: 64 MB
DEVIATIONS = 4.0


@dataclass(frozen=True)
class Settings:
    """What a clustering depends on beside the parts."""

    threshold: float = THRESHOLD
    bands: int = BANDS
    memory_rows: int = MEMORY_ROWS


@dataclass(frozen=True)
class Clusters:
    """dropped: int64 [n, 2], numbers of documents to drop, ascending, each with the one that stands for it.

    sizes: how many clusters there are of each size above one. candidates, verified: pairs before and after the exact
    comparison.
    """

    dropped: Numbers
    sizes: Counter[int]
    candidates: int
    verified: int


def _band_rows(store: Store, settings: Settings) -> Iterator[Rows]:
    """(band key, number) of all documents that have words."""
    for part, offset in zip(store.parts, store.offsets.tolist(), strict=False):
        filled = np.diff(part.starts) > 0
        for start in range(0, part.documents, READ_ROWS):
            rows = start + np.flatnonzero(filled[start : start + READ_ROWS])
            keys = band_keys(part.signatures[rows], settings.bands)
            yield rows_of(keys.reshape(-1), np.repeat(rows + offset, settings.bands))


def pairs_of_groups(block: Rows) -> Iterator[Rows]:
    """(smaller, larger) of documents with an equal key; block [n, 2] is sorted by key, and in a key by number."""
    keys, numbers = block[:, 0], block[:, 1]
    for distance in range(1, NEIGHBOURS + 1):
        first = np.flatnonzero(keys[distance:] == keys[:-distance])
        if not len(first):
            return
        yield rows_of(numbers[first], numbers[first + distance])
    starts = group_starts(keys)
    large = np.diff(starts) > NEIGHBOURS + 1
    for start, stop in zip(starts[:-1][large].tolist(), starts[1:][large].tolist(), strict=True):
        others = numbers[start + NEIGHBOURS + 1 : stop]
        yield rows_of(np.full(len(others), numbers[start]), others)


def candidate_pairs(store: Store, settings: Settings, folder: Path) -> Iterator[Numbers]:
    """Pairs int64 [n, 2] of documents, at most one of them existing, that agree in a band; each pair once."""
    by_key = RowSorter(folder / "bands", settings.memory_rows)
    for rows in _band_rows(store, settings):
        by_key.add(rows)
    by_left = RowSorter(folder / "pairs", settings.memory_rows)
    old = int(sum(part.documents for part in store.parts if part.existing))
    for block in by_key.blocks():
        for pairs in pairs_of_groups(block):
            by_left.add(pairs[pairs[:, 1] >= old])
    for block in by_left.blocks():
        order = np.lexsort((block[:, 1], block[:, 0]))
        pairs = block[order]
        fresh = np.ones(len(pairs), dtype=bool)
        fresh[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
        yield pairs[fresh].astype(np.int64)


def _promising(store: Store, pairs: Numbers, threshold: float) -> npt.NDArray[np.bool_]:
    """Which pairs may reach the threshold, by their signatures and by the sizes of their sets [n]."""
    deviation = np.sqrt(threshold * (1 - threshold) / store.parts[0].permutations)
    left, right = store.signatures(pairs[:, 0]), store.signatures(pairs[:, 1])
    likely = agreement(left, right) >= threshold - DEVIATIONS * deviation
    sizes = np.sort(np.stack([store.set_sizes(pairs[:, 0]), store.set_sizes(pairs[:, 1])]), axis=0)
    return likely & (sizes[0] >= threshold * sizes[1])


def exact_jaccard(store: Store, pairs: Numbers) -> npt.NDArray[np.float64]:
    """Jaccard similarity [n] of pairs [n, 2] from their shingle sets, a bounded number of hashes at a time."""
    weights = np.cumsum(store.set_sizes(pairs[:, 0]) + store.set_sizes(pairs[:, 1]))
    found = np.empty(len(pairs), dtype=np.float64)
    start = 0
    while start < len(pairs):
        room = (weights[start - 1] if start else 0) + SET_HASHES
        stop = max(start + 1, int(np.searchsorted(weights, room, side="right")))
        numbers, places = np.unique(pairs[start:stop], return_inverse=True)
        places = places.reshape(-1, 2)
        found[start:stop] = jaccard_of_rows(*store.sets(numbers), places[:, 0], places[:, 1])
        start = stop
    return found


def _edges(store: Store, settings: Settings, folder: Path, counts: Counter[str]) -> Iterator[Numbers]:
    for block in candidate_pairs(store, settings, folder):
        counts["candidates"] += len(block)
        for start in range(0, len(block), READ_ROWS):
            pairs = block[start : start + READ_ROWS]
            pairs = pairs[_promising(store, pairs, settings.threshold)]
            pairs = pairs[exact_jaccard(store, pairs) >= settings.threshold]
            counts["verified"] += len(pairs)
            yield pairs


def _members(parent: Numbers, sorter: RowSorter) -> Iterator[Rows]:
    """(root, number) of all documents of clusters above one, sorted by both, clusters whole within a block."""
    for start in range(0, len(parent), MEMORY_ROWS):
        roots = parent[start : start + MEMORY_ROWS]
        numbers = np.arange(start, start + len(roots))
        joined = roots != numbers
        sorter.add(rows_of(roots[joined], numbers[joined]))
    for block in sorter.blocks():
        starts = group_starts(block[:, 0])
        roots = block[starts[:-1], 0]
        rows = np.concatenate([rows_of(roots, roots), block])
        yield rows[np.lexsort((rows[:, 1], rows[:, 0]))]


def _choose(store: Store, rows: Rows, sizes: Counter[int]) -> Numbers:
    """(document to drop, the one that stands for it) of clusters (root, number) [n, 2]."""
    numbers = rows[:, 1].astype(np.int64)
    existing = store.column("existing", numbers) > 0
    order = np.lexsort(
        (numbers, -store.column("sizes", numbers), -store.column("scores", numbers), ~existing, rows[:, 0])
    )
    starts = group_starts(rows[order, 0])
    lengths = np.diff(starts)
    sizes.update(lengths.tolist())
    kept = np.repeat(numbers[order][starts[:-1]], lengths)
    dropped = (numbers[order] != kept) & ~existing[order]
    return np.stack([numbers[order][dropped], kept[dropped]], axis=1)


def find_clusters(store: Store, settings: Settings, folder: Path) -> Clusters:
    """Cluster all documents of a store. `folder` is for scratch files and is gone afterwards."""
    total = int(store.offsets[-1])
    folder.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    found = [np.zeros((0, 2), dtype=np.int64)]
    if total:
        parent = np.memmap(folder / "parent", dtype=np.int64, mode="w+", shape=(total,))
        for start in range(0, total, MEMORY_ROWS):
            stop = min(start + MEMORY_ROWS, total)
            parent[start:stop] = np.arange(start, stop)
        for pairs in _edges(store, settings, folder, counts):
            left, right = np.ascontiguousarray(pairs.T)
            kernels().joy_union(parent, left, right, len(pairs))
        kernels().joy_flatten(parent, total)
        for rows in _members(parent, RowSorter(folder / "clusters", settings.memory_rows)):
            found.append(_choose(store, rows, sizes))
        del parent
    shutil.rmtree(folder)
    dropped = np.concatenate(found)
    return Clusters(dropped[np.argsort(dropped[:, 0])], sizes, counts["candidates"], counts["verified"])
