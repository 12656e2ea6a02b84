"""What readers give: documents, and records that are none, each with its reason; never fatal, never silent."""

import gzip
import zlib
from dataclasses import dataclass
from typing import Any

import zstandard

from data_pipeline.code.signals import REASONS as CODE_REASONS

EXCERPT = 160  # bytes of a rejected record that are kept for a person to look at
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BROKEN_STREAM = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


@dataclass(slots=True)  # making a frozen one takes three times as long
class Document:
    """text: UTF-8, not blank; url: where known.

    offset: where its record is: first byte in the decompressed file; in a .warc.gz the first byte of its gzip member in
    the file itself, as in CDX indices; in parquet the row; of a repository the number of the document. part: which part
    of its record it is, where records are cut.
    """

    text: bytes
    offset: int
    licence: str | None
    url: str | None = None
    part: int = 0


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
    "missing_text": "a record without a string (pages: a list of strings) in the text field",
    "empty": "no text, or white space only",
    "binary": "a file with NUL bytes, a record that is NULs for more than half, a page with many control characters",
    "too_large": "a record above max_document_megabytes",
    "broken_compression": "a compressed file that ends or breaks in the middle",
    "compressed": "a file in a compression that its name does not say, or that is not read (bzip2, xz, lz4, zip, 7z)",
    "unreadable": "a file that the system does not let us read",
    "broken_record": "a WARC record without a header that can be read, or shorter than it says",
    "broken_http": "a WARC response whose HTTP message cannot be read",
    "http_status": "a WARC response that is not 200",
    "not_html": "a WARC record that holds something other than a page",
    "broken_parquet": "a parquet file or row group that cannot be read",
    **{f"file_{reason}": f"a file of a repository: {meaning}" for reason, meaning in CODE_REASONS.items()},
}


def excerpt(content: bytes) -> str:
    """How a record begins."""
    return content[:EXCERPT].decode("utf-8", "backslashreplace")


def not_utf8(content: bytes) -> bool:
    """Whether bytes are something else."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def mostly_nul(content: bytes) -> bool:
    """Whether more than half of a text is NULs."""
    return b"\0" in content and 2 * content.count(b"\0") > len(content)


def stated(value: Any) -> str | None:
    """A licence or URL of a record, where it is a string that says something and can be written."""
    if not isinstance(value, str) or not value.strip():
        return None
    return value.encode("utf-8", "replace").decode()
