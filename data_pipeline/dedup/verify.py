"""Which candidates are near-duplicates: signatures tell most pairs apart, shingle sets decide about the rest.

1. Pairs whose signatures agree in far fewer entries than the threshold (4 standard deviations) go, and pairs whose sets
   differ too much in size.
2. Of the others the exact Jaccard similarity of the shingle sets is computed.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from data_pipeline.dedup.external import Rows, merged
from data_pipeline.dedup.match import READ_ROWS
from data_pipeline.dedup.minhash import Numbers, agreement, jaccard_of_rows
from data_pipeline.dedup.store import Store

SET_HASHES = 8_000_000  # shingle hashes in memory together: 64 MB
DEVIATIONS = 4.0


def distinct_pairs(bands: Sequence[Rows], memory_rows: int) -> Iterator[Numbers]:
    """(smaller, larger) int64 [n, 2] of documents, each once, from bands' (larger, smaller) sorted by the larger."""
    for block in merged(bands, memory_rows):
        pairs = block[np.lexsort((block[:, 1], block[:, 0]))]
        fresh = np.ones(len(pairs), dtype=bool)
        fresh[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
        yield pairs[fresh][:, ::-1].astype(np.int64)


def _promising(store: Store, pairs: Numbers, threshold: float) -> npt.NDArray[np.bool_]:
    """Which pairs may reach the threshold, by their signatures and by the sizes of their sets [n]."""
    left, right = store.signatures(pairs[:, 0]), store.signatures(pairs[:, 1])
    deviation = np.sqrt(threshold * (1 - threshold) / left.shape[1])
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


def near_pairs(store: Store, candidates: Numbers, threshold: float) -> Numbers:
    """Those of candidates [n, 2] whose similarity reaches the threshold [m, 2]."""
    found = [np.zeros((0, 2), dtype=np.int64)]
    for start in range(0, len(candidates), READ_ROWS):
        pairs = candidates[start : start + READ_ROWS]
        pairs = pairs[_promising(store, pairs, threshold)]
        found.append(pairs[exact_jaccard(store, pairs) >= threshold])
    return np.concatenate(found)
