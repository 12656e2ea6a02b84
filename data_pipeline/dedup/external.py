"""Sorting more rows than fit in memory: sorted runs on disk, merged block by block.

A row is two unsigned 64-bit numbers, key and value. Equal keys stay in the order in which they came. At most
`memory_rows` rows are held while runs are made, twice that while one is sorted, about as many while they are merged. A
key with more rows than that is held whole.
"""

import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.native.library import kernels

Rows = npt.NDArray[np.uint64]
MEMORY_ROWS = 4_000_000  # 64 MB, and as much again while a run is sorted


def rows_of(keys: npt.NDArray[np.integer], values: npt.NDArray[np.integer]) -> Rows:
    """Keys [n] and values [n] as rows [n, 2]."""
    return np.stack([keys.astype(np.uint64, copy=False), values.astype(np.uint64, copy=False)], axis=1)


def sort_rows(rows: Rows) -> None:
    """Sort rows [n, 2] by key in place, equal keys as they were."""
    kernels().joy_sort_rows(rows, np.empty_like(rows), len(rows))


class RowSorter:
    """Takes rows in any order and gives them back by key.

    The folder is the sorter's own: made anew at the start and removed once all rows were given back.
    """

    def __init__(self, folder: Path, memory_rows: int = MEMORY_ROWS) -> None:
        self._folder = folder
        self._memory_rows = memory_rows
        self._waiting: list[Rows] = []
        self._count = 0
        self._runs: list[Path] = []
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def add(self, rows: Rows) -> None:
        """Take rows [n, 2]."""
        for start in range(0, len(rows), self._memory_rows):
            part = rows[start : start + self._memory_rows]
            if self._count + len(part) > self._memory_rows:
                self._write_run()
            self._waiting.append(part)
            self._count += len(part)

    def _write_run(self) -> None:
        if not self._count:
            return
        rows = np.concatenate(self._waiting)
        self._waiting.clear()
        self._count = 0
        sort_rows(rows)
        self._runs.append(self._folder / f"run_{len(self._runs):05d}")
        rows.tofile(self._runs[-1])

    def blocks(self) -> Iterator[Rows]:
        """All rows by key, in blocks; a key's rows are never divided between two. Afterwards the sorter is spent."""
        self._write_run()
        yield from merged([read_rows(path) for path in self._runs], self._memory_rows)
        shutil.rmtree(self._folder)


def read_rows(path: Path) -> Rows:
    """The rows [n, 2] of a file, mapped."""
    if not path.stat().st_size:
        return np.zeros((0, 2), dtype=np.uint64)
    return np.memmap(path, dtype=np.uint64, mode="r").reshape(-1, 2)


def merged(runs: Sequence[Rows], memory_rows: int) -> Iterator[Rows]:
    """The rows of sorted runs by key, in blocks of about `memory_rows`; a key's rows are never divided between two."""
    places = [0] * len(runs)
    while any(place < len(run) for place, run in zip(places, runs, strict=True)):
        yield _next_block(runs, places, memory_rows)


def _next_block(runs: Sequence[Rows], places: list[int], memory_rows: int) -> Rows:
    """The rows up to the least of the keys that end each run's next piece; advances `places`."""

    def stop_of(run: Rows, place: int) -> int:
        # Not searchsorted: it would copy the whole column.
        return len(run) if limit is None else bisect_right(range(len(run)), limit, place, key=lambda i: run[i, 0])

    piece = max(1, memory_rows // max(1, len(runs)))
    ends = [
        int(run[place + piece - 1, 0])
        for run, place in zip(runs, places, strict=True)
        if place < len(run) and place + piece <= len(run)
    ]
    limit = min(ends, default=None)
    stops = [stop_of(run, place) for run, place in zip(runs, places, strict=True)]
    rows = np.concatenate([run[place:stop] for run, place, stop in zip(runs, places, stops, strict=True)])
    places[:] = stops
    sort_rows(rows)
    return rows


def group_starts(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Where each group of equal neighbours starts in keys [n], and n at the end."""
    changes = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    return np.concatenate([[0], changes, [len(keys)]]).astype(np.int64) if len(keys) else np.zeros(1, np.int64)
