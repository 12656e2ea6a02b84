"""An HTTP response as text: transfer and content encoding undone within bounds, the character set found."""

import io
import re
import zlib

from data_pipeline.readers.base import BROKEN_STREAM, EXCERPT, Document, Record, Rejected, excerpt
from megatron_joy.data.zstd import open_zstd

HTML_TYPES = (b"text/html", b"application/xhtml+xml")
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how such streams begin
# Codings that no library of ours undoes; names that are none (a character set, "none") change nothing.
UNREAD_CODINGS = {b"br", b"compress", b"x-compress", b"dcb", b"dcz", b"bzip2", b"xz", b"lzma"}
LONGEST_HEADER = 1 << 17
DETECTED = 1 << 16  # bytes that the guess of a character set looks at, and characters that tell a page from an image
CONTROLS, CONTROL_SHARE = re.compile("[\0-\x08\x0b\x0e-\x1a\x1c-\x1f]"), 0.02


class BrokenMessage(Exception):
    """What can't be read as an HTTP response; args: what is wrong."""


def _split(message: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, header fields in lower case, and the body as it was sent."""
    for end in (b"\r\n\r\n", b"\n\n"):
        head, found, body = message[:LONGEST_HEADER].partition(end)
        if found:
            body = message[len(head) + len(end) :]
            break
    else:
        raise BrokenMessage("no end of its header")
    first, *lines = head.splitlines()
    parts = first.split()
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/") or not parts[1].isdigit() or len(parts[1]) != 3:
        raise BrokenMessage(f"status line {first[:40]!r}")
    fields = {}
    for line in lines:
        name, _, value = line.partition(b":")
        fields[name.strip().lower()] = value.strip()
    return int(parts[1]), fields, body


def _unchunk(body: bytes) -> bytes:
    """The body of a chunked message; many crawlers keep the header and undo the chunks, then it stays as it is."""
    parts: list[bytes] = []
    place = 0
    while True:
        end = body.find(b"\r\n", place, place + 64)
        size = body[place:end].partition(b";")[0].strip()
        if end < 0 or not size or len(size) > 12 or size.strip(b"0123456789abcdefABCDEF"):
            return body if not parts else b"".join(parts)
        length = int(size, 16)
        if length == 0:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + length])
        place = end + 2 + length + 2


def _inflate(body: bytes, window: int, limit: int) -> bytes:
    """At most limit + 1 bytes of a stream's content, of several streams one after another the content of all."""
    content = b""
    while body and len(content) <= limit:
        try:
            inflate = zlib.decompressobj(window)
            content += inflate.decompress(body, limit + 1 - len(content))
        except zlib.error as error:
            raise BrokenMessage(f"content encoding: {error}") from None
        body = inflate.unused_data
        if not body.startswith(GZIP):
            break
    return content


def _unzstd(body: bytes, limit: int) -> bytes:
    try:
        return open_zstd(io.BytesIO(body)).read(limit + 1)
    except BROKEN_STREAM as error:
        raise BrokenMessage(f"content encoding: {error}") from None


def _uncode(coding: bytes, body: bytes, limit: int) -> bytes:
    """The body with one coding undone. A crawler that undid it may have kept the header: then it is a page already."""
    if coding in (b"gzip", b"x-gzip"):
        return _inflate(body, 31, limit) if body.startswith(GZIP) else body
    if body.lstrip().startswith(b"<"):
        return body
    if coding == b"deflate":
        return _inflate(body, 15 if body[:1] == b"\x78" else -15, limit)
    if coding == b"zstd":
        return _unzstd(body, limit) if body.startswith(ZSTD) else body
    if coding in UNREAD_CODINGS:
        raise BrokenMessage(f"content encoding {coding.decode()} is not supported")
    return body


def _codings(fields: dict[bytes, bytes], name: bytes) -> list[bytes]:
    return [coding.strip() for coding in fields.get(name, b"").lower().split(b",")]


def _decoded(fields: dict[bytes, bytes], body: bytes, limit: int) -> bytes:
    """The body with its encodings undone, the last one first, at most limit + 1 bytes. Raises BrokenMessage."""
    transfer = _codings(fields, b"transfer-encoding")
    if b"chunked" in transfer:
        body = _unchunk(body)
    for coding in reversed([*_codings(fields, b"content-encoding"), *transfer]):
        body = _uncode(coding, body, limit)
    return body


def _parameter(content_type: bytes) -> str | None:
    """The charset of a Content-Type."""
    _, found, value = content_type.lower().partition(b"charset=")
    return value.split(b";")[0].strip(b" \"'").decode("ascii", "ignore") if found else None


def decode(content: bytes, stated: str | None) -> str:
    """A page's text. The order is HTML's: byte order mark, HTTP header, meta tag; then UTF-8, then a guess (uchardet).

    What is stated and doesn't fit the bytes is passed over; what fits nothing is decoded with U+FFFD in its place.
    """
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    for mark, name in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if content.startswith(mark):
            return content[len(mark) :].decode(name, "replace")
    if stated:
        known: str | None = map_encoding_to_html5(stated, fallback_utf8=False)
        if known:
            try:
                return content.decode(known)
            except (UnicodeDecodeError, LookupError):
                pass
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        guess = detect_encoding(content, max_len=DETECTED, from_html_meta=True) or "windows-1252"
        return str(bytes_to_str(content, guess, "replace", fallback_encodings=()))


def _is_binary(text: str) -> bool:
    """Whether what is called a page is an image, an archive or the like: those are control characters for a tenth."""
    beginning = text[:DETECTED]
    return CONTROL_SHARE * len(beginning) < len(CONTROLS.findall(beginning))


def page_of(message: bytes, offset: int, url: str | None, limit: int) -> Record:
    """The HTML page of an HTTP response, or why it is none."""
    try:
        status, fields, body = _split(message)
        if status != 200:
            return Rejected("http_status", offset, f"{status} {url or ''}")
        kind = fields.get(b"content-type", b"")
        if not kind.lower().startswith(HTML_TYPES) and (kind or b"<" not in body[:1024]):
            return Rejected("not_html", offset, excerpt(b"Content-Type: " + kind))
        content = _decoded(fields, body, limit)
    except BrokenMessage as error:
        return Rejected("broken_http", offset, str(error))
    if len(content) > limit:
        return Rejected("too_large", offset, excerpt(content))
    text = decode(content, _parameter(kind))
    if _is_binary(text):
        return Rejected("binary", offset, f"{url or ''} {excerpt(content)}"[:EXCERPT])
    if not text.strip():
        return Rejected("empty", offset, url or "")
    return Document(text.encode("utf-8", "replace"), offset, None, url)
