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
import xxhash

from data_pipeline.dedup.external import Rows, RowSorter, group_starts

LINE_BITS = 20  # a position is a document's number and, in so many bits, a span's number in it
MOST_SPANS = 1 << LINE_BITS
Positions = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class SpanSettings:
    """length: lines of a span; min_bytes: of its normal form."""

    length: int = 3
    min_bytes: int = 100


def _normal_lines(text: str) -> tuple[list[bytes], list[int]]:
    """The lines that are not blank, in normal form, and their numbers."""
    found = [(" ".join(line.split()).casefold(), number) for number, line in enumerate(text.split("\n"))]
    kept = [(line.encode(), number) for line, number in found if line]
    return [line for line, _ in kept], [number for _, number in kept]


def span_rows(number: int, text: bytes, settings: SpanSettings) -> Rows:
    """(hash, position) of the spans of document `number`. Those beyond its first 2^20 are not looked at."""
    lines, _ = _normal_lines(text.decode())
    rows = []
    for start in range(min(len(lines) - settings.length + 1, MOST_SPANS)):
        span = b"\n".join(lines[start : start + settings.length])
        if len(span) >= settings.min_bytes:
            rows.append((xxhash.xxh3_64_intdigest(span), number << LINE_BITS | start))
    return np.array(rows, dtype=np.uint64).reshape(-1, 2)


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
    _, numbers = _normal_lines(decoded)
    gone = {numbers[start + step] for start in spans.tolist() for step in range(settings.length)}
    kept = [line for number, line in enumerate(decoded.split("\n")) if number not in gone]
    return "\n".join(kept).encode(), len(gone)
