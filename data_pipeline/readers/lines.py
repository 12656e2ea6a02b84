"""JSON Lines: a text a line, or the pages of a parsed PDF a line."""

from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from data_pipeline.config import SourceSection
from data_pipeline.inventory import Piece
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


def _parse_line(line: bytes, offset: int, source: SourceSection) -> Record:
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


def _skip_line(stream: BinaryIO, limit: int, room: float) -> int:
    """Read to the end of a line in bounded pieces, or `room` bytes of it; returns how many bytes that were."""
    skipped = 0
    while skipped < room and (part := stream.readline(limit)):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def read_lines(stream: BinaryIO, piece: Piece, source: SourceSection, limit: int) -> Iterator[Record]:
    """One document per line; blank lines are no records. A line belongs to the piece that its first byte is in."""
    offset = start = piece.start
    # No further than the piece goes: a line of a hundred pieces is not read a hundred times to its end.
    end = float("inf") if piece.end is None else piece.end
    try:
        if offset:
            stream.seek(offset - 1)
            offset += _skip_line(stream, limit, end - offset + 1) - 1
        while offset < end:
            start = offset
            line = stream.readline(limit + 1)
            if not line:
                return
            offset += len(line)
            if len(line) > limit and not line.endswith(b"\n"):
                offset += _skip_line(stream, limit, end - offset)
                yield Rejected("too_large", start, excerpt(line))
                continue
            content = line.removeprefix(BYTE_ORDER_MARK) if start == 0 else line
            if not content.isspace():
                yield _parse_line(content, start, source)
    except BROKEN_STREAM as error:
        yield Rejected("broken_compression", start, str(error))
