"""Parquet: a document a row, from the columns that are asked for; a piece has whole row groups."""

from collections.abc import Iterator
from typing import Any, BinaryIO

from data_pipeline.config import SourceSection
from data_pipeline.inventory import Piece
from data_pipeline.readers.base import Document, Record, Rejected, excerpt, mostly_nul, not_utf8, stated
from data_pipeline.transform.base import require
from megatron_joy.errors import UserError

BATCH, BATCH_BYTES = 512, 16_000_000  # rows, and about how much of all their columns, that are decoded at a time
BUFFER = 1 << 20  # compressed bytes that are read at a time: a column of one row group can have gigabytes


def _columns(source: SourceSection) -> list[str]:
    wanted = (source.text_field, source.licence_field, source.url_field)
    return list(dict.fromkeys(name for name in wanted if name))


def check_columns(schema: Any, source: SourceSection, path: str) -> None:
    """Raises UserError when a column is missing or the text is no text."""
    import pyarrow.types as types

    twice = [name for name in _columns(source) if schema.names.count(name) > 1]
    if twice:
        raise UserError(f"{path}: several columns are called {', '.join(twice)}; write it again with one of them")
    missing = [name for name in _columns(source) if name not in schema.names]
    if missing:
        raise UserError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(schema.names) or 'none'}: set text_field, "
            f"licence_field or url_field of source {source.name}"
        )
    kind = schema.field(source.text_field).type
    if types.is_dictionary(kind):  # as pandas writes categories
        kind = kind.value_type
    texts = (
        types.is_null,
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
    )
    if not any(check(kind) for check in texts):
        raise UserError(
            f"{path}: column {source.text_field} holds {kind}, expected strings: set text_field of source {source.name}"
        )


def _group_start(group: Any) -> int:
    """The first byte of a row group's first column."""
    column = group.column(0)
    first = column.dictionary_page_offset
    return int(column.data_page_offset if first is None else min(first, column.data_page_offset))


def _batch_of(group: Any) -> int:
    """How many rows of a group are decoded at a time."""
    row = group.total_byte_size // max(1, group.num_rows)
    return int(min(BATCH, max(1, BATCH_BYTES // max(1, row))))


def _row(values: dict[str, Any], offset: int, source: SourceSection, limit: int) -> Record:
    text = values[source.text_field]
    if text is None:
        return Rejected("missing_text", offset, "null")
    content = text.encode() if isinstance(text, str) else bytes(text)
    if len(content) > limit:
        return Rejected("too_large", offset, excerpt(content))
    if not_utf8(content):
        return Rejected("not_utf8", offset, excerpt(content))
    if not content.decode().strip():
        return Rejected("empty", offset, excerpt(content))
    if mostly_nul(content):
        return Rejected("binary", offset, excerpt(content))
    licence = stated(values[source.licence_field]) if source.licence_field else None
    return Document(content, offset, licence, stated(values[source.url_field]) if source.url_field else None)


def _rows(batch: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    """A batch's rows; strings as bytes, because a damaged file's strings need not be UTF-8."""
    import pyarrow as pa

    columns = []
    for name in names:
        column = batch.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        if text and name == names[0]:
            column = column.cast(pa.large_binary())
        columns.append(column.to_pylist())
    return (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def read_parquet(stream: BinaryIO, piece: Piece, source: SourceSection, limit: int) -> Iterator[Record]:
    """The rows of the row groups that start in the piece. A file or group that breaks is put aside at its row."""
    require("pyarrow", f'source {source.name} with reader = "parquet"')
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = (pa.ArrowException, OSError, ValueError)
    offset = 0
    try:
        file = pq.ParquetFile(stream, buffer_size=BUFFER)
        check_columns(file.schema_arrow, source, getattr(stream, "name", b"").decode("utf-8", "backslashreplace"))
        names = _columns(source)
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    except broken as error:
        if piece.start == 0:
            yield Rejected("broken_parquet", 0, str(error)[:160])
        return
    for number, group in enumerate(groups):
        start = _group_start(group) if number else 0
        if piece.start <= start and (piece.end is None or start < piece.end):
            place = offset
            try:
                for batch in file.iter_batches(_batch_of(group), row_groups=[number], columns=names, use_threads=False):
                    for values in _rows(batch, names):
                        yield _row(values, place, source, limit)
                        place += 1
            except broken as error:
                lost = f"rows {place} to {offset + group.num_rows - 1}: {error}"
                yield Rejected("broken_parquet", place, lost[:160])
        offset += group.num_rows
