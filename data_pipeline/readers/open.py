"""Opening a piece of an input with the reader of its source."""

import gzip
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

from data_pipeline.chunk import chunks, estimated_tokens
from data_pipeline.config import Pipeline, SourceSection
from data_pipeline.inventory import MEGABYTE, InputFile, Piece
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


def _read(file: InputFile, piece: Piece, source: SourceSection, limit: int) -> Iterator[Record]:
    if source.reader == "repository":
        yield from read_repository(file, source, limit)
        return
    try:
        raw = open(file.location.encode("latin-1"), "rb", buffering=1 << 20)  # noqa: SIM115 (closed below)
    except OSError as error:
        yield Rejected("unreadable", piece.start, error.strerror or type(error).__name__)
        return
    with raw:
        size = os.fstat(raw.fileno()).st_size
        if size != file.size:
            raise WorkError(f"{file.path}: {size} bytes, expected {file.size}: it changed during the run; run again")
        plain = source.reader in SELF_OPENING
        stream = raw if plain else OPENERS.get(Path(file.path).suffix, lambda plain: plain)(raw)
        yield from READERS[source.reader](stream, piece, source, limit)
