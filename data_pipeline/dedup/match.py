"""Candidates for near-duplicates, band by band: documents that agree in all entries of a band of their signatures.

The keys of one band of all documents are sorted externally and equal ones become pairs, which are sorted by their
larger document. Bands know nothing of each other, so each can be another task's work; a pair that agrees in several of
them is found as often, and once looked at (verify.py). What comes out depends on the parts and their order alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.dedup.bands import BANDS, band_key
from data_pipeline.dedup.external import MEMORY_ROWS, Rows, RowSorter, group_starts, rows_of
from data_pipeline.dedup.store import Store

THRESHOLD = 0.9
# Of a larger group of equal keys each document is compared with this many that follow and with the group's first:
# the work stays linear, and a document has as many chances as it has bands.
NEIGHBOURS = 64
READ_ROWS = 65_536  # documents or pairs whose signatures are in memory together


@dataclass(frozen=True)
class Settings:
    """What near-duplicates depend on beside the parts, and memory: `memory_rows` rows of 16 bytes a few times over."""

    threshold: float = THRESHOLD
    bands: int = BANDS
    memory_rows: int = MEMORY_ROWS


def _band_rows(store: Store, bands: int, band: int) -> Iterator[Rows]:
    """(band key, number) of all documents that have words."""
    for part, offset in zip(store.parts(), store.offsets.tolist(), strict=False):
        for start in range(0, part.documents, READ_ROWS):
            rows = np.arange(start, min(start + READ_ROWS, part.documents))
            rows = rows[part.set_sizes(rows) > 0]
            yield rows_of(band_key(part.signatures[rows], bands, band), rows + offset)


def pairs_of_groups(block: Rows) -> Iterator[Rows]:
    """(larger, smaller) of documents with an equal key; block [n, 2] is sorted by key, and in a key by number."""
    keys, numbers = block[:, 0], block[:, 1]
    for distance in range(1, NEIGHBOURS + 1):
        first = np.flatnonzero(keys[distance:] == keys[:-distance])
        if not len(first):
            return
        yield rows_of(numbers[first + distance], numbers[first])
    starts = group_starts(keys)
    large = np.diff(starts) > NEIGHBOURS + 1
    for start, stop in zip(starts[:-1][large].tolist(), starts[1:][large].tolist(), strict=True):
        others = numbers[start + NEIGHBOURS + 1 : stop]
        yield rows_of(others, np.full(len(others), numbers[start]))


def match_band(store: Store, band: int, settings: Settings, folder: Path) -> Iterator[Rows]:
    """(larger, smaller) [n, 2] of documents that agree in a band, at most one of them existing, by the larger.

    No pair comes twice. `folder` is for scratch files, which are gone afterwards.
    """
    by_key = RowSorter(folder / "keys", settings.memory_rows)
    for rows in _band_rows(store, settings.bands, band):
        by_key.add(rows)
    by_larger = RowSorter(folder / "pairs", settings.memory_rows)
    for block in by_key.blocks():
        for pairs in pairs_of_groups(block):
            by_larger.add(pairs[pairs[:, 0] >= store.existing])
    yield from by_larger.blocks()
