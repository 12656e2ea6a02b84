"""From pairs of near-duplicates to clusters, out of core: union-find, and one document of each cluster kept.

The array of union-find is a file of 8 bytes for each document. Of each cluster one document is kept: all documents of
existing parts are kept, and if there is one, no other; else the one with the highest score, of equals the longest text,
of equals the smallest number (order of the inputs). What comes out depends on the parts and their order alone. Memory:
`memory_rows` rows of 16 bytes a few times over, and the largest cluster.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data_pipeline.dedup.external import MEMORY_ROWS, Rows, RowSorter, group_starts, rows_of
from data_pipeline.dedup.minhash import Numbers
from data_pipeline.dedup.store import Store
from data_pipeline.native.library import kernels


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
    existing = numbers < store.existing
    order = np.lexsort(
        (numbers, -store.column("sizes", numbers), -store.column("scores", numbers), ~existing, rows[:, 0])
    )
    starts = group_starts(rows[order, 0])
    lengths = np.diff(starts)
    sizes.update(lengths.tolist())
    kept = np.repeat(numbers[order][starts[:-1]], lengths)
    dropped = (numbers[order] != kept) & ~existing[order]
    return np.stack([numbers[order][dropped], kept[dropped]], axis=1)


def find_clusters(
    store: Store, pairs: Iterable[Numbers], folder: Path, sizes: Counter[int], memory_rows: int = MEMORY_ROWS
) -> Iterator[Numbers]:
    """Cluster documents; yields (document to drop, the one that stands for it) int64 [n, 2], clusters whole in a block.

    Args:
        store: all documents.
        pairs: near-duplicates, int64 [n, 2] each.
        folder: for scratch files, which are gone afterwards.
        sizes: gets how many clusters there are of each size above one.
        memory_rows: rows of 16 bytes that may be held a few times over.
    """
    total = int(store.offsets[-1])
    if not total:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "parent"
    parent = np.memmap(path, dtype=np.int64, mode="w+", shape=(total,))
    for start in range(0, total, MEMORY_ROWS):
        stop = min(start + MEMORY_ROWS, total)
        parent[start:stop] = np.arange(start, stop)
    for block in pairs:
        left, right = np.ascontiguousarray(block.T)
        kernels().joy_union(parent, left, right, len(block))
    kernels().joy_flatten(parent, total)
    for rows in _members(parent, RowSorter(folder / "clusters", memory_rows)):
        yield _choose(store, rows, sizes)
    path.unlink()
