"""Opening a piece of an input with the reader of its source."""

import gzip
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import BinaryIO, cast

from data_pipeline.chunk import chunks, estimated_tokens
from data_pipeline.config import Pipeline, SourceSection
from data_pipeline.inventory import MEGABYTE, UNSEEN, InputFile, Piece, compression_of
from data_pipeline.readers.base import Record, Rejected
from data_pipeline.readers.columns import read_parquet
from data_pipeline.readers.files import description, whole_file, without_front_matter
from data_pipeline.readers.lines import read_lines
from data_pipeline.readers.repository import read_repository
from data_pipeline.readers.warc import read_warc
from megatron_joy.data.zstd import open_zstd
from megatron_joy.errors import WorkError

Reader = Callable[[BinaryIO, Piece, SourceSection, int], Iterator[Record]]


def _gunzip(raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw))


OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {".gz": _gunzip, ".zst": open_zstd}
# How compressed files begin, with the endings of those that are read.
COMPRESSIONS = {
    b"\x1f\x8b\x08": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
SELF_OPENING = {"warc", "parquet"}  # readers that want the file itself
READERS: dict[str, Reader] = {
    "jsonl": read_lines,
    "pages": read_lines,
    "text": whole_file(),
    "markdown": whole_file(without_front_matter),
    "code": whole_file(),
    "python_environment": whole_file(description),
    "parquet": read_parquet,
    "warc": read_warc,
}


def _cut(records: Iterator[Record], tokens: int) -> Iterator[Record]:
    """Each document in parts of about so many tokens; every part is a record."""
    for record in records:
        if isinstance(record, Rejected):
            yield record
            continue
        for number, part in enumerate(chunks(record.text.decode(), tokens, estimated_tokens)):
            yield replace(record, text=part.encode(), part=number)


def read_piece(pipeline: Pipeline, file: InputFile, piece: Piece) -> Iterator[Record]:
    """The records of a piece, each a document or why it is none.

    Raises WorkError when the file is not the one that the plan was made for, UserError for a parquet file without the
    columns asked for or a package that is not installed.
    """
    source = pipeline.sources[file.source]
    records = _read(file, piece, source, int(pipeline.max_document_megabytes * MEGABYTE))
    yield from _cut(records, source.chunk_tokens) if source.chunk_tokens else records


def _open(file: InputFile) -> BinaryIO:
    """An input. Without O_NONBLOCK a pipe that took its place would be waited for, for ever."""
    return open(
        file.location.encode("latin-1"),
        "rb",
        buffering=1 << 20,
        opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK),
    )


def _check_unchanged(file: InputFile, status: os.stat_result) -> None:
    """Raises WorkError when a file is not the one that was planned."""
    found, expected = f"{status.st_size} bytes", str(file.size)
    if not stat.S_ISREG(status.st_mode):
        found = "no file any more"
    elif status.st_size == file.size and status.st_mtime_ns != file.modified_ns != UNSEEN:
        found, expected = "written to", "no change"
    elif status.st_size == file.size:
        return
    raise WorkError(f"{file.path}: {found}, expected {expected}: it changed during the run; run again")


def _misnamed(stream: BinaryIO, named: str | None) -> str | None:
    """What a file's first bytes say that it is compressed with, where its name doesn't; it stays at its beginning."""
    beginning = stream.read(10)
    stream.seek(0)
    return next((kind for mark, kind in COMPRESSIONS.items() if beginning.startswith(mark) and kind != named), None)


def _read(file: InputFile, piece: Piece, source: SourceSection, limit: int) -> Iterator[Record]:
    if source.reader == "repository":
        yield from read_repository(file, source, limit)
        return
    try:
        raw = _open(file)
    except OSError as error:
        yield Rejected("unreadable", piece.start, error.strerror or type(error).__name__)
        return
    with raw:
        _check_unchanged(file, os.fstat(raw.fileno()))
        try:
            yield from _records(raw, file, piece, source, limit)
        except OSError as error:  # of the disk; what is wrong with its content the readers tell
            reason = error.strerror or type(error).__name__
            raise WorkError(f"{file.path}: {reason} while it was read; mend it and run again") from None


def _records(raw: BinaryIO, file: InputFile, piece: Piece, source: SourceSection, limit: int) -> Iterator[Record]:
    if source.reader in SELF_OPENING:
        yield from READERS[source.reader](raw, piece, source, limit)
        return
    compression = compression_of(file.path)
    kind = _misnamed(raw, compression)
    if kind is not None:
        if piece.start == 0:
            yield Rejected("compressed", 0, f"{kind} inside; compress it as .gz or .zst, and name it so")
        return
    stream = OPENERS[compression](raw) if compression else raw
    yield from READERS[source.reader](stream, piece, source, limit)
