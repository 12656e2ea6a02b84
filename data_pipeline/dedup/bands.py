"""Locality-sensitive hashing: a signature is cut into bands; texts that agree in a whole band become candidates."""

import numpy as np
import numpy.typing as npt

from data_pipeline.dedup.minhash import Signatures

BANDS = 16  # times 8 entries: 0.9999 of the pairs at Jaccard 0.9 become candidates, 0.95 of those at 0.8
ODD = 0x9E3779B97F4A7C15


def candidate_probability(similarity: float, bands: int, rows: int) -> float:
    """Chance that texts of this Jaccard similarity agree in at least one of `bands` bands of `rows` entries."""
    return 1.0 - (1.0 - similarity**rows) ** bands


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """MurmurHash3's finaliser, on each element."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(33))
    return mixed


def band_key(signatures: Signatures, bands: int, band: int) -> npt.NDArray[np.uint64]:
    """The key of one of `bands` bands of signatures [n, permutations]: uint64 [n], the band's number is part of it.

    Different contents share a key with a chance of 2^-64, and then cost a comparison.
    """
    rows = signatures.shape[1] // bands
    keys = np.repeat(_mix(np.array([band + 1], dtype=np.uint64)), len(signatures))
    for place in range(band * rows, (band + 1) * rows):
        keys = keys * np.uint64(ODD) + signatures[:, place]
    return _mix(keys)
