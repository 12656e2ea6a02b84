"""Files that are one document each: text, sources, Markdown, and what the Python environment holds."""

import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

from data_pipeline.config import SourceSection
from data_pipeline.environment import description_of
from data_pipeline.inventory import Piece
from data_pipeline.readers.base import BROKEN_STREAM, BYTE_ORDER_MARK, Document, Record, Rejected, excerpt, not_utf8

# A block of metadata between two lines of three dashes (YAML) or pluses (TOML) at the very beginning.
FRONT_MATTER = re.compile(rb"\A(---|\+\+\+)[ \t]*\r?\n(?:.*\r?\n){0,200}?\1[ \t]*(?:\r?\n|\Z)")


def whole_text(stream: BinaryIO, limit: int) -> bytes | Rejected:
    """A file as one document's bytes, or why it is none."""
    try:
        content = stream.read(limit + 1)
    except BROKEN_STREAM as error:
        return Rejected("broken_compression", 0, str(error))
    content = content.removeprefix(BYTE_ORDER_MARK)
    checks = (
        ("too_large", len(content) > limit),
        ("binary", b"\0" in content),
        ("not_utf8", not_utf8(content)),
        ("empty", not content.decode("utf-8", "ignore").strip()),
    )
    reason = next((reason for reason, applies in checks if applies), None)
    return content if reason is None else Rejected(reason, 0, excerpt(content))


def without_front_matter(content: bytes) -> bytes:
    """Markdown without the metadata that site generators keep above it."""
    return FRONT_MATTER.sub(b"", content, count=1).lstrip(b"\r\n")


def description(content: bytes) -> bytes:
    """Of a distribution's METADATA the long description; any other file as it is."""
    if content.startswith(b"Metadata-Version:"):
        return description_of(content.decode()).strip().encode("utf-8", "replace")
    return content


def whole_file(
    change: Callable[[bytes], bytes] = bytes,
) -> Callable[[BinaryIO, Piece, SourceSection, int], Iterator[Record]]:
    """A reader for which the file, changed, is the document."""

    def read(stream: BinaryIO, piece: Piece, source: SourceSection, limit: int) -> Iterator[Record]:
        content = whole_text(stream, limit)
        if isinstance(content, bytes):
            text = change(content)
            content = text if text.decode().strip() else Rejected("empty", 0, excerpt(content))
        yield content if isinstance(content, Rejected) else Document(content, 0, None)

    return read
