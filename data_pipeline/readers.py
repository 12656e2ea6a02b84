"""From files to documents. What is not a document is put aside with its reason: never fatal, never silent."""

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import orjson
import zstandard

from data_pipeline.config import Pipeline, SourceSection
from data_pipeline.environment import description_of
from data_pipeline.inventory import MEGABYTE, InputFile, Piece
from megatron_joy.data.zstd import open_zstd
from megatron_joy.errors import WorkError

EXCERPT = 160  # bytes of a rejected record that are kept for a person to look at
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BROKEN_STREAM = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


@dataclass(frozen=True, slots=True)
class Document:
    """text: UTF-8, not blank; offset: first byte of its record in the decompressed file; url: where known."""

    text: bytes
    offset: int
    licence: str | None
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that is no document: why, where, and how it begins."""

    reason: str
    offset: int
    excerpt: str


Record = Document | Rejected
# What each reason means, for people.
REASONS = {
    "not_utf8": "bytes that are not UTF-8",
    "broken_json": "a line that is not JSON",
    "missing_text": "JSON without a string in the text field",
    "empty": "no text, or white space only",
    "binary": "a file with NUL bytes",
    "too_large": "a record above max_document_megabytes",
    "broken_compression": "a compressed file that ends or breaks in the middle",
    "unreadable": "a file that the system does not let us read",
}


def _gunzip(raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw))


def _unzstd(raw: BinaryIO) -> BinaryIO:
    return open_zstd(raw)


OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {".gz": _gunzip, ".zst": _unzstd}


def _excerpt(content: bytes) -> str:
    return content[:EXCERPT].decode("utf-8", "backslashreplace")


def _not_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def _parse_line(line: bytes, offset: int, source: SourceSection) -> Record:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return Rejected("not_utf8" if _not_utf8(line) else "broken_json", offset, _excerpt(line))
    text = record.get(source.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return Rejected("missing_text", offset, _excerpt(line))
    if not text or text.isspace():
        return Rejected("empty", offset, _excerpt(line))
    licence = record.get(source.licence_field) if source.licence_field else None
    return Document(text.encode(), offset, licence if isinstance(licence, str) else None)


def _skip_line(stream: BinaryIO, limit: int) -> int:
    """Read to the end of a line in bounded pieces; returns how many bytes that were."""
    skipped = 0
    while part := stream.readline(limit):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _read_jsonl(stream: BinaryIO, piece: Piece, source: SourceSection, limit: int) -> Iterator[Record]:
    """One document per line; blank lines are no records. A line belongs to the piece that its first byte is in."""
    offset = piece.start
    if offset:
        stream.seek(offset - 1)
        offset += _skip_line(stream, limit) - 1
    while piece.end is None or offset < piece.end:
        start = offset
        try:
            line = stream.readline(limit + 1)
        except BROKEN_STREAM as error:
            yield Rejected("broken_compression", start, str(error))
            return
        if not line:
            return
        offset += len(line)
        if len(line) > limit and not line.endswith(b"\n"):
            offset += _skip_line(stream, limit)
            yield Rejected("too_large", start, _excerpt(line))
            continue
        content = line.removeprefix(BYTE_ORDER_MARK) if start == 0 else line
        if content.strip():
            yield _parse_line(content, start, source)


def _whole_text(stream: BinaryIO, limit: int) -> bytes | Rejected:
    """A file as one document's bytes, or why it is none."""
    try:
        content = stream.read(limit + 1)
    except BROKEN_STREAM as error:
        return Rejected("broken_compression", 0, str(error))
    content = content.removeprefix(BYTE_ORDER_MARK)
    checks = (
        ("too_large", len(content) > limit),
        ("binary", b"\0" in content),
        ("not_utf8", _not_utf8(content)),
        ("empty", not content.strip()),
    )
    reason = next((reason for reason, applies in checks if applies), None)
    return content if reason is None else Rejected(reason, 0, _excerpt(content))


def _read_file(stream: BinaryIO, piece: Piece, source: SourceSection, limit: int) -> Iterator[Record]:
    """The file is the document."""
    content = _whole_text(stream, limit)
    yield content if isinstance(content, Rejected) else Document(content, 0, None)


def _read_environment(stream: BinaryIO, piece: Piece, source: SourceSection, limit: int) -> Iterator[Record]:
    """As a file; of a distribution's METADATA the long description."""
    content = _whole_text(stream, limit)
    if isinstance(content, bytes) and content.startswith(b"Metadata-Version:"):
        content = description_of(content.decode()).strip().encode()
        content = content or Rejected("empty", 0, "METADATA without a description")
    yield content if isinstance(content, Rejected) else Document(content, 0, None)


READERS: dict[str, Callable[[BinaryIO, Piece, SourceSection, int], Iterator[Record]]] = {
    "jsonl": _read_jsonl,
    "text": _read_file,
    "code": _read_file,
    "python_environment": _read_environment,
}


def read_piece(pipeline: Pipeline, file: InputFile, piece: Piece) -> Iterator[Record]:
    """The records of a piece, each a document or why it is none.

    Raises WorkError when the file is not the one that the plan was made for.
    """
    source = pipeline.sources[file.source]
    limit = int(pipeline.max_document_megabytes * MEGABYTE)
    try:
        raw = open(file.location.encode("latin-1"), "rb", buffering=1 << 20)  # noqa: SIM115 (closed below)
    except OSError as error:
        yield Rejected("unreadable", piece.start, error.strerror or type(error).__name__)
        return
    with raw:
        size = os.fstat(raw.fileno()).st_size
        if size != file.size:
            raise WorkError(f"{file.path}: {size} bytes, expected {file.size}: it changed during the run; run again")
        stream = OPENERS.get(Path(file.path).suffix, lambda plain: plain)(raw)
        yield from READERS[source.reader](stream, piece, source, limit)
