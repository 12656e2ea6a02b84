"""WARC (ISO 28500): pages of a crawl, from plain, gzip (a member a record, as crawlers write it) and zstd files.

Documents are HTML as text; an `extract` transform makes prose of it. A member that breaks costs that member alone: the
next one is looked for byte by byte, so one flipped bit doesn't lose the rest of a gigabyte. For the same reason a
.warc.gz can be read in pieces: a member belongs to the piece that its first byte is in.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import zstandard

from data_pipeline.config import SourceSection
from data_pipeline.inventory import Piece
from data_pipeline.readers.base import BROKEN_STREAM, Record, Rejected, excerpt
from data_pipeline.readers.http import page_of
from data_pipeline.transform.base import require
from megatron_joy.data.zstd import open_zstd

GZIP = b"\x1f\x8b\x08"
VERSION = b"WARC/"
CHUNK = 1 << 16
SMALL_CHUNK = 1 << 13  # most members hold a few kilobytes, and what is read behind their end is read again
BEGINNING = 512  # compressed bytes that hold at least the first 16 of a record
LONGEST_LINE, MOST_LINES = 1 << 16, 1000
DICTIONARY_FRAME = 0x184D2A5D  # a skippable zstd frame with the dictionary of all others
# What a WARC holds beside responses, and what is no record of a page at all.
SCAFFOLDING = {b"warcinfo", b"request", b"metadata", b"revisit", b"continuation"}


class BrokenRecord(Exception):
    """What can't be read as a WARC record; args: what is wrong. offset: where it begins, once that is known."""

    offset = 0


class Member(io.RawIOBase):
    """The decompressed bytes of one gzip member. Raises zlib.error or EOFError where it is broken.

    end: the offset behind it in the file, once all was read.
    """

    def __init__(self, raw: BinaryIO, start: int) -> None:
        raw.seek(start)
        self._raw = raw
        self._inflate = zlib.decompressobj(31)
        self._taken = start
        self._output = b""
        self.end: int | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output and not self._inflate.eof:
            chunk = self._inflate.unconsumed_tail
            if not chunk:
                chunk = self._raw.read(SMALL_CHUNK)
                if not chunk:
                    raise EOFError("the last gzip member is cut short")
                self._taken += len(chunk)
            self._output = self._inflate.decompress(chunk, CHUNK)
            if self._inflate.eof:
                self.end = self._taken - len(self._inflate.unused_data)
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count


def _first_line(stream: BinaryIO) -> bytes:
    """The next line that is not blank; nothing at the end."""
    line = stream.readline(LONGEST_LINE)
    while line in (b"\r\n", b"\n"):
        line = stream.readline(LONGEST_LINE)
    return line


def _read_header(line: bytes, stream: BinaryIO) -> dict[bytes, bytes]:
    """A record's named fields, lower case, from its first line on. Raises BrokenRecord."""
    if not line.startswith(VERSION):
        raise BrokenRecord(f"expected WARC/1, found {line[:40]!r}")
    fields: dict[bytes, bytes] = {}
    for _ in range(MOST_LINES):
        line = stream.readline(LONGEST_LINE)
        if line in (b"\r\n", b"\n"):
            return fields
        name, colon, value = line.partition(b":")
        if not colon:
            break
        fields[name.strip().lower()] = value.strip()
    raise BrokenRecord("its header has no end")


def _length(fields: dict[bytes, bytes]) -> int:
    text = fields.get(b"content-length", b"")
    if not text.isdigit() or len(text) > 18:
        raise BrokenRecord(f"Content-Length is {text[:20]!r}")
    return int(text)


def _skip(stream: BinaryIO, size: int) -> None:
    while size > 0:
        part = stream.read(min(size, CHUNK))
        if not part:
            raise BrokenRecord("shorter than its Content-Length")
        size -= len(part)


def _record(stream: BinaryIO, fields: dict[bytes, bytes], offset: int, limit: int) -> Record | None:
    """The page of a record whose header was read, None for scaffolding. Raises BrokenRecord."""
    length = _length(fields)
    kind = fields.get(b"warc-type", b"").lower()
    if kind in SCAFFOLDING or length > limit:
        _skip(stream, length)
        return None if kind in SCAFFOLDING else Rejected("too_large", offset, excerpt(repr(fields).encode()))
    content = stream.read(length)
    if len(content) < length:
        raise BrokenRecord("shorter than its Content-Length")
    url = fields.get(b"warc-target-uri", b"").strip(b"<>").decode("utf-8", "replace") or None
    if kind == b"response":
        return page_of(content, offset, url, limit)
    if kind == b"resource":
        message = b"HTTP/1.0 200\r\nContent-Type: " + fields.get(b"content-type", b"") + b"\r\n\r\n" + content
        return page_of(message, offset, url, limit)
    return Rejected("not_html", offset, excerpt(b"WARC-Type: " + kind))


def _records(stream: BinaryIO, offset: int | None, limit: int) -> Iterator[Record]:
    """The pages of a stream of records. offset: of its gzip member, None where the stream's own positions count.

    Raises BrokenRecord, and what the stream raises.
    """
    while line := _first_line(stream):
        place = stream.tell() - len(line) if offset is None else offset
        try:
            record = _record(stream, _read_header(line, stream), place, limit)
        except BrokenRecord as error:
            error.offset = place
            raise
        if record is not None:
            yield record


def next_member(raw: BinaryIO, start: int) -> int | None:
    """The offset of the first gzip member from `start` on that begins with a WARC record, or None."""
    if _begins_record(raw, start):
        return start
    position, window = start, b""
    raw.seek(start)
    while True:
        found = window.find(GZIP)
        if found >= 0:
            place = position + found
            if _begins_record(raw, place):
                return place
            window, position = window[found + 1 :], place + 1
            continue
        kept = window[-(len(GZIP) - 1) :]
        position += len(window) - len(kept)
        raw.seek(position + len(kept))
        chunk = raw.read(CHUNK)
        if not chunk:
            return None
        window = kept + chunk


def _begins_record(raw: BinaryIO, place: int) -> bool:
    raw.seek(place)
    try:
        return zlib.decompressobj(31).decompress(raw.read(BEGINNING), 16).startswith(VERSION)
    except zlib.error:
        return False


def _beginning_at(raw: BinaryIO, place: int) -> str:
    """How what stands at a place of the file begins; nothing at its end."""
    raw.seek(place)
    return excerpt(raw.read(160))


def _read_members(raw: BinaryIO, piece: Piece, limit: int) -> Iterator[Record]:
    # Where a member must begin; None where only looking can tell: in a piece from the middle, behind a broken one.
    due = None if piece.start else 0
    place: int | None = piece.start
    while place is not None and (piece.end is None or place < piece.end):
        found = next_member(raw, place)
        if due is not None and found != due and (beginning := _beginning_at(raw, due)):
            yield Rejected("broken_compression", due, beginning)
        if found is None or (piece.end is not None and found >= piece.end):
            return
        member = Member(raw, found)
        stream = cast(BinaryIO, io.BufferedReader(member, SMALL_CHUNK))
        try:
            yield from _records(stream, found, limit)
            _skip_rest(stream)
        except BROKEN_STREAM as error:
            yield Rejected("broken_compression", found, str(error))
        except BrokenRecord as error:
            yield Rejected("broken_record", found, str(error))
        due = member.end
        place = found + 1 if due is None else due


def _skip_rest(stream: BinaryIO) -> None:
    while stream.read(CHUNK):
        pass


class Counted(io.RawIOBase):
    """A stream that knows how many bytes were taken from it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._place = 0

    def read(self, size: int = -1) -> bytes:
        part = self._stream.read(size)
        self._place += len(part)
        return part

    def readline(self, size: int | None = -1) -> bytes:
        part = self._stream.readline(-1 if size is None else size)
        self._place += len(part)
        return part

    def tell(self) -> int:
        return self._place


def _to_next_record(stream: BinaryIO) -> bytes | None:
    """Go on to the next line that begins a record and return it; None at the end."""
    while line := stream.readline(LONGEST_LINE):
        if line.startswith(VERSION) and line.strip() in (b"WARC/1.0", b"WARC/1.1", b"WARC/0.18"):
            return line
    return None


def _read_stream(stream: BinaryIO, limit: int) -> Iterator[Record]:
    """A stream without members. After a broken record it goes on at the next line that begins one."""
    counted = cast(BinaryIO, Counted(stream))
    while True:
        try:
            yield from _records(counted, None, limit)
            return
        except BROKEN_STREAM as error:
            yield Rejected("broken_compression", counted.tell(), str(error))
            return
        except BrokenRecord as error:
            yield Rejected("broken_record", error.offset, str(error))
        try:
            line = _to_next_record(counted)
        except BROKEN_STREAM as error:
            yield Rejected("broken_compression", counted.tell(), str(error))
            return
        if line is None:
            return
        place = counted.tell() - len(line)
        counted = cast(BinaryIO, Counted(cast(BinaryIO, _Again(line, counted))))
        counted._place = place  # type: ignore[attr-defined]


class _Again:
    """A stream with a line put back in front of it."""

    def __init__(self, line: bytes, stream: BinaryIO) -> None:
        self._line, self._stream = line, stream

    def readline(self, size: int = -1) -> bytes:
        line, self._line = self._line, b""
        return line or self._stream.readline(size)

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(size)


def _open_zstd_warc(raw: BinaryIO) -> BinaryIO:
    """A .warc.zst, with the dictionary that may stand in front of it (IIPC's proposal)."""
    head = raw.read(8)
    if len(head) == 8 and struct.unpack("<II", head)[0] == DICTIONARY_FRAME:
        content = raw.read(min(struct.unpack("<II", head)[1], 1 << 27))
        if content.startswith(b"\x28\xb5\x2f\xfd"):
            content = zstandard.ZstdDecompressor().decompress(content, max_output_size=1 << 27)
        return open_zstd(raw, zstandard.ZstdCompressionDict(content))
    raw.seek(0)
    return open_zstd(raw)


def read_warc(raw: BinaryIO, piece: Piece, source: SourceSection, limit: int) -> Iterator[Record]:
    """The pages of a piece of a WARC; requests, metadata and the like are no records of ours."""
    require("resiliparse", f'source {source.name} with reader = "warc"')
    name = getattr(raw, "name", b"")
    suffix = (name if isinstance(name, bytes) else str(name).encode()).lower()
    if suffix.endswith(b".gz"):
        yield from _read_members(raw, piece, limit)
        return
    try:
        stream = _open_zstd_warc(raw) if suffix.endswith(b".zst") else raw
    except BROKEN_STREAM as error:
        yield Rejected("broken_compression", 0, str(error))
        return
    yield from _read_stream(stream, limit)
