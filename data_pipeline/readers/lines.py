"""JSON Lines: a text a line, or the pages of a parsed PDF a line.

Lines come in blocks. A kernel takes the wanted strings out of those that are plain (native/jsonl.c); the others, and
pages, go through a whole parser, which also says what is wrong with them.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import orjson

from data_pipeline.config import SourceSection
from data_pipeline.inventory import Piece
from data_pipeline.native.library import kernels
from data_pipeline.readers.base import (
    BROKEN_STREAM,
    BYTE_ORDER_MARK,
    Document,
    Record,
    Rejected,
    excerpt,
    mostly_nul,
    not_utf8,
    stated,
)

BLOCK = 1 << 20  # bytes that are read at a time
SLACK = 32  # bytes behind a block that the kernel may look at, or write over
MOST_LINES = 4096  # that the kernel parses at a time


def _text_of(record: Any, source: SourceSection) -> str | None:
    """The text of a record, None when it has none."""
    value = record.get(source.text_field) if isinstance(record, dict) else None
    if source.reader == "jsonl":
        return value if isinstance(value, str) else None
    if not isinstance(value, list):
        return None
    # Parsers write pages as strings, or as objects with the page's number beside its text.
    pages = [page.get("text") if isinstance(page, dict) else page for page in value]
    texts = [page.strip("\n") for page in pages if isinstance(page, str)]
    return "\n\n".join(texts) if len(texts) == len(pages) else None


def _parse_line(line: bytes, offset: int, source: SourceSection) -> Record | None:
    """A line's record; a blank line has none."""
    line = line if offset else line.removeprefix(BYTE_ORDER_MARK)
    if line.isspace():
        return None
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return Rejected("not_utf8" if not_utf8(line) else "broken_json", offset, excerpt(line))
    text = _text_of(record, source)
    if text is None:
        return Rejected("missing_text", offset, excerpt(line))
    if not text or text.isspace():
        return Rejected("empty", offset, excerpt(line))
    content = text.encode()
    if mostly_nul(content):
        return Rejected("binary", offset, excerpt(line))
    licence = stated(record.get(source.licence_field)) if source.licence_field else None
    url = stated(record.get(source.url_field)) if source.url_field else None
    return Document(content, offset, licence, url)


class _Block:
    """A block of lines, and what the kernel finds in them."""

    def __init__(self, source: SourceSection, limit: int) -> None:
        self._source, self._limit = source, limit
        names = [name.encode() for name in (source.text_field, *filter(None, (source.licence_field, source.url_field)))]
        if source.reader != "jsonl" or len(set(names)) < len(names):
            names = []  # the kernel only finds lines then
        self._names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self._has_licence, self._has_url = bool(source.licence_field), bool(source.url_field)
        self._lines, self._strings = (np.zeros(BLOCK + SLACK, dtype=np.uint8) for _ in range(2))
        self._rows = np.zeros((MOST_LINES, 3 + 2 * len(names)), dtype=np.int64)
        self.bytes, self._taken = memoryview(self._lines), memoryview(self._strings)

    def keep(self, begin: int, size: int) -> int:
        """Move what was not parsed to the block's beginning; returns how many bytes that are."""
        self.bytes[: size - begin] = self.bytes[begin:size]
        return size - begin

    def parse(self, begin: int, size: int) -> list[list[int]]:
        """A row for each whole line from `begin` on, in a block of `size` bytes; none when no whole line is left."""
        fields = (self._names, self._ends, len(self._ends))
        lines = self._lines[begin:]
        found = kernels().joy_json_lines(lines, size - begin, *fields, self._strings, self._rows, MOST_LINES)
        rows: list[list[int]] = self._rows[:found].tolist()
        return rows

    def record(self, row: list[int], begin: int, offset: int) -> Record | None:
        """A row's record; rows count from `begin` in the block, which is `offset` in the file."""
        first, last, taken = row[:3]
        if taken and last - first <= self._limit:
            licence = self._string(row[5:7]) if self._has_licence else None
            url = self._string(row[-2:]) if self._has_url else None
            return Document(bytes(self._taken[row[3] : row[4]]), offset + first, licence, url)
        line = bytes(self.bytes[begin + first : begin + last])
        if len(line) > self._limit + 1:
            return Rejected("too_large", offset + first, excerpt(line[: self._limit + 1]))
        return _parse_line(line, offset + first, self._source)

    def _string(self, place: list[int]) -> str | None:
        begin, end = place
        return stated(bytes(self._taken[begin:end]).decode()) if end >= 0 else None


def _skip_line(stream: BinaryIO, limit: int, room: float) -> int:
    """Read to the end of a line in bounded pieces, or `room` bytes of it; returns how many bytes that were."""
    skipped = 0
    while skipped < room and (part := stream.readline(limit)):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _open_line(
    stream: BinaryIO, begun: bytes, offset: int, end: float, source: SourceSection, limit: int
) -> tuple[Record | None, int]:
    """A line that its block doesn't end: a long one, or the last of its piece. Returns its record and its size."""
    line = begun + (stream.readline(limit + 1 - len(begun)) if len(begun) <= limit else b"")
    if len(line) > limit and not line.endswith(b"\n"):
        skipped = _skip_line(stream, limit, end - offset - len(line))
        return Rejected("too_large", offset, excerpt(line[: limit + 1])), len(line) + skipped
    return (_parse_line(line, offset, source) if line else None), len(line)


def read_lines(stream: BinaryIO, piece: Piece, source: SourceSection, limit: int) -> Iterator[Record]:
    """One document per line; blank lines are no records. A line belongs to the piece that its first byte is in."""
    offset = piece.start
    # No further than the piece goes: a line of a hundred pieces is not read a hundred times to its end.
    end = float("inf") if piece.end is None else piece.end
    block, held = _Block(source, limit), 0
    try:
        if offset:
            stream.seek(offset - 1)
            offset += _skip_line(stream, limit, end - offset + 1) - 1
        while offset < end:
            got = stream.readinto1(block.bytes[held : int(min(BLOCK, end - offset))])  # type: ignore[attr-defined]
            size, begin = held + got, 0
            while rows := block.parse(begin, size):
                records = [block.record(row, begin, offset) for row in rows]
                begin, offset = begin + rows[-1][1], offset + rows[-1][1]
                yield from filter(None, records)
            held = block.keep(begin, size)
            if begin == got == 0:
                record, size = _open_line(stream, bytes(block.bytes[:held]), offset, end, source, limit)
                if not size:
                    return
                offset, held = offset + size, 0
                if record is not None:
                    yield record
    except BROKEN_STREAM as error:
        yield Rejected("broken_compression", offset, str(error))
