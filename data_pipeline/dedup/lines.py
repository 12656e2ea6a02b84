"""Repeated spans of lines: boilerplate that is the same in many documents which are not duplicates as a whole.

A span is `length` lines in a row, blank ones passed over, compared without case and with white space collapsed; spans
of fewer than `min_bytes` say too little and are left alone. Of equal spans the first in the order of the documents
stays, the lines of all others are removed. CCNet does the same with single lines and C4 with three sentences; spans let
common short lines live.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.dedup.external import Rows, RowSorter, group_starts
from data_pipeline.native.library import kernels

LINE_BITS = 20  # a position is a document's number and, in so many bits, a span's number in it
MOST_SPANS = 1 << LINE_BITS
Positions = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SpanSettings:
    """length: lines of a span; min_bytes: of its normal form."""

    length: int = 3
    min_bytes: int = 100


def _lines(text: str) -> tuple[Positions, Numbers, Numbers]:
    """Of the lines that are not blank: hashes of their normal form, its bytes, their numbers [lines] each."""
    content = text.casefold().encode()
    most = content.count(b"\n") + 1
    hashes, sizes, numbers = np.empty(most, np.uint64), np.empty(most, np.int64), np.empty(most, np.int64)
    found = kernels().joy_line_hashes(content, len(content), hashes.ctypes.data, sizes.ctypes.data, numbers.ctypes.data)
    return hashes[:found], sizes[:found], numbers[:found]


def span_rows(number: int, text: bytes, settings: SpanSettings) -> Rows:
    """(hash, position) of the spans of document `number`. Those beyond its first 2^20 are not looked at."""
    hashes, sizes, _ = _lines(text.decode())
    lines = min(len(hashes), MOST_SPANS + settings.length - 1)
    rows = np.empty((max(0, lines - settings.length + 1), 2), dtype=np.uint64)
    arguments = (lines, settings.length, settings.min_bytes, number << LINE_BITS, rows.ctypes.data)
    return rows[: kernels().joy_spans(hashes.ctypes.data, sizes.ctypes.data, *arguments)]


def repeated_positions(by_hash: RowSorter) -> Iterator[Positions]:
    """The positions of spans that an earlier position has too, in any order.

    by_hash: has taken the rows of `span_rows` in the order of the documents.
    """
    for block in by_hash.blocks():
        later = np.ones(len(block), dtype=bool)
        later[group_starts(block[:, 0])[:-1]] = False
        yield block[later, 1]


def without_spans(text: bytes, spans: npt.NDArray[np.int64], settings: SpanSettings) -> tuple[bytes, int]:
    """The text without the lines of these spans, and how many lines that were."""
    decoded = text.decode()
    _, _, numbers = _lines(decoded)
    gone = {numbers[start + step] for start in spans.tolist() for step in range(settings.length)}
    kept = [line for number, line in enumerate(decoded.split("\n")) if number not in gone]
    return "\n".join(kept).encode(), len(gone)
