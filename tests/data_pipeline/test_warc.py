"""WARC: pages as fastwarc reads them, each broken record put aside alone, pieces that together give each page once."""

import gzip
import zlib
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.config import Pipeline, SourceSection
from data_pipeline.inventory import Piece, take_inventory
from data_pipeline.readers.base import Document, Record, Rejected
from data_pipeline.readers.http import decode
from data_pipeline.readers.open import read_piece
from data_pipeline.readers.warc import read_warc

HTML = b"Content-Type: text/html; charset=utf-8\r\n"


def response(url: str, body: bytes, headers: bytes = HTML, status: bytes = b"200 OK", kind: str = "response") -> bytes:
    message = b"HTTP/1.1 " + status + b"\r\n" + headers + b"\r\n" + body
    fields = f"Content-Type: application/http; msgtype=response\r\nWARC-Target-URI: {url}\r\n"
    return record(kind, message, fields.encode())


def record(kind: str, content: bytes, fields: bytes = b"", length: int | None = None) -> bytes:
    size = len(content) if length is None else length
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:1>\r\nContent-Length: {size}\r\n".encode()
    return head + fields + b"\r\n" + content + b"\r\n\r\n"


def page(number: int) -> bytes:
    return f"<html><body><p>Seite {number} für alle: {'ab' * (number * 7 % 50)}</p></body></html>".encode()


RECORDS = [
    record("warcinfo", b"software: none\r\n"),
    *(
        part
        for number in range(20)
        for part in (
            record("request", b"GET / HTTP/1.1\r\n\r\n"),
            response(f"https://example.org/{number}", page(number)),
            record("metadata", b"fetchTimeMs: 3\r\n"),
        )
    ),
    response("https://example.org/404", b"<p>gone</p>", status=b"404 Not Found"),
    response("https://example.org/x.png", b"\x89PNG", headers=b"Content-Type: image/png\r\n"),
    response("https://example.org/blank", b" \n"),
]


def members(records: list[bytes]) -> bytes:
    return b"".join(gzip.compress(part, mtime=0) for part in records)


COMPRESSORS = {
    ".warc": b"".join,
    ".warc.gz": members,
    ".warc.zst": lambda records: b"".join(map(zstandard.ZstdCompressor().compress, records)),
}


def read(path: Path, shard_megabytes: float = 1.0, limit: float = 1.0) -> list[Record]:
    wanted = Pipeline.model_validate(
        {
            "name": "p",
            "sources": [{"name": "a", "reader": "warc", "paths": [str(path)]}],
            "tokenizer": {"vocab_size": 300},
            "output": {"folder": "x", "shard_megabytes": shard_megabytes},
            "max_document_megabytes": limit,
        }
    )
    inventory = take_inventory(wanted)
    pieces = [piece for task in inventory.tasks for piece in task]
    return [found for piece in pieces for found in read_piece(wanted, inventory.inputs[piece.input], piece)]


def write(folder: Path, suffix: str, content: bytes) -> Path:
    path = folder / f"a{suffix}"
    path.write_bytes(content)
    return path


def pages(records: list[Record]) -> list[tuple[str | None, bytes]]:
    return [(found.url, found.text) for found in records if isinstance(found, Document)]


def reasons(records: list[Record]) -> Counter[str]:
    return Counter(found.reason for found in records if isinstance(found, Rejected))


EXPECTED = [(f"https://example.org/{number}", page(number)) for number in range(20)]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_pages_come_with_their_urls_and_the_rest_is_counted(tmp_path: Path, suffix: str) -> None:
    found = read(write(tmp_path, suffix, COMPRESSORS[suffix](RECORDS)))
    assert pages(found) == EXPECTED
    assert reasons(found) == {"http_status": 1, "not_html": 1, "empty": 1}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_fastwarc_finds_the_same_pages_at_the_same_offsets(tmp_path: Path, suffix: str) -> None:
    fastwarc = pytest.importorskip("fastwarc.warc")
    path = write(tmp_path, suffix, COMPRESSORS[suffix](RECORDS))
    theirs = []
    with open(path, "rb") as stream:
        for one in fastwarc.ArchiveIterator(stream, record_types=fastwarc.WarcRecordType.response):
            body = one.reader.read()
            if one.http_headers.status_code == 200 and "html" in one.http_content_type and body.strip():
                theirs.append((one.headers["WARC-Target-URI"], body, one.stream_pos))
    ours = [(found.url, found.text, found.offset) for found in read(path) if isinstance(found, Document)]
    if suffix == ".warc.zst":  # it counts compressed bytes there, we count the stream's
        theirs, ours = [row[:2] for row in theirs], [row[:2] for row in ours]
    assert ours == theirs


def test_a_dictionary_in_front_of_a_zstd_warc_is_used(tmp_path: Path) -> None:
    dictionary = zstandard.train_dictionary(1024, [page(number) for number in range(500)])
    compressor = zstandard.ZstdCompressor(dict_data=dictionary)
    content = dictionary.as_bytes()
    frame = (0x184D2A5D).to_bytes(4, "little") + len(content).to_bytes(4, "little") + content
    body = b"".join(compressor.compress(part) for part in RECORDS)
    assert pages(read(write(tmp_path, ".warc.zst", frame + body))) == EXPECTED


@settings(deadline=None, max_examples=25)
@given(st.integers(40, 3000))
def test_a_gzip_warc_cut_anywhere_gives_each_page_once(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    path = write(tmp_path_factory.mktemp("cut"), ".warc.gz", members(RECORDS))
    assert read(path, target / 1_000_000) == read(path)


def test_each_broken_record_is_put_aside_alone_and_says_where(tmp_path: Path) -> None:
    parts = [gzip.compress(part, mtime=0) for part in RECORDS]
    place = sum(map(len, parts[:5]))
    broken = bytearray(b"".join(parts))
    for offset in range(place + 20, place + len(parts[5]) - 8):
        broken[offset] ^= 0x55
    found = read(write(tmp_path, ".warc.gz", bytes(broken)))
    assert pages(found) == EXPECTED[:1] + EXPECTED[2:]
    (aside,) = [one for one in found if isinstance(one, Rejected) and one.reason.startswith("broken_")]
    assert aside.offset == place


@pytest.mark.parametrize("suffix", [".warc", ".warc.gz"])
def test_a_record_shorter_or_longer_than_it_says_costs_what_it_must(tmp_path: Path, suffix: str) -> None:
    short = record("response", b"HTTP/1.1 200 OK\r\n\r\n<p>x</p>", length=500)
    nothing = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: many\r\n\r\n"
    content = COMPRESSORS[suffix]([RECORDS[2], short if suffix == ".warc.gz" else nothing, RECORDS[5]])
    found = read(write(tmp_path, suffix, content))
    assert pages(found) == EXPECTED[:2]
    assert reasons(found) == {"broken_record": 1}
    (broken,) = [one for one in found if isinstance(one, Rejected)]
    assert broken.offset == len(COMPRESSORS[suffix]([RECORDS[2]]))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(COMPRESSORS)), st.floats(0.01, 0.999))
def test_a_truncated_warc_keeps_its_whole_records(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, share: float
) -> None:
    content = COMPRESSORS[suffix](RECORDS)
    found = read(write(tmp_path_factory.mktemp("cut"), suffix, content[: int(len(content) * share)]))
    assert pages(found) == EXPECTED[: len(pages(found))]
    assert sum(reasons(found)[name] for name in ("broken_record", "broken_compression")) <= 1
    if suffix != ".warc":
        assert len(pages(found)) >= int(20 * share) - 6


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(COMPRESSORS)), st.binary(max_size=300), st.integers(0, 60))
@example(".warc.gz", b"\x1f\x8b\x08", 3)
@example(".warc.gz", b"\x1f\x8b\x08" * 40, 0)
@example(".warc", b"WARC/1.0\r\n", 5)
@example(".warc", b"WARC/1.0\r\nContent-Length: 99999999999999999\r\n\r\n", 5)
@example(".warc.zst", b"\x5d\x2a\x4d\x18\xff\xff\xff\xff", 0)
@example(".warc.zst", b"\x28\xb5\x2f\xfd", 2)
def test_any_bytes_in_between_never_stop_the_reader(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, noise: bytes, place: int
) -> None:
    parts = [COMPRESSORS[suffix]([part]) for part in RECORDS]
    content = b"".join([*parts[:place], noise, *parts[place:]])
    found = read(write(tmp_path_factory.mktemp("noise"), suffix, content))
    assert set(pages(found)) <= set(EXPECTED)
    if suffix == ".warc.gz":
        assert pages(found) == EXPECTED


def test_a_page_that_inflates_without_end_is_too_large(tmp_path: Path) -> None:
    bomb = zlib.compressobj(9, wbits=31)
    body = bomb.compress(b"<p>" + b"a" * 30_000_000) + bomb.flush()
    headers = HTML + b"Content-Encoding: gzip\r\n"
    found = read(write(tmp_path, ".warc", response("https://example.org/", body, headers)))
    assert reasons(found) == {"too_large": 1}
    long = read(write(tmp_path, ".warc.gz", members([response("u", b"<p>" + b"b" * 3_000_000), RECORDS[2]])))
    assert reasons(long) == {"too_large": 1}
    assert pages(long) == EXPECTED[:1]


@pytest.mark.parametrize("headers", [b"Content-Encoding: gzip\r\n", b"Content-Encoding: deflate\r\n", b""])
def test_encodings_of_the_transfer_are_undone(tmp_path: Path, headers: bytes) -> None:
    body = page(3)
    if b"gzip" in headers:
        body = gzip.compress(body)
    elif b"deflate" in headers:
        body = zlib.compress(body)
    chunked = b"".join(
        b"%x\r\n%s\r\n" % (len(body[start : start + 50]), body[start : start + 50]) for start in range(0, len(body), 50)
    )
    sent = response("u", chunked + b"0\r\n\r\n", HTML + headers + b"Transfer-Encoding: chunked\r\n")
    undone = response("u", page(3), HTML + headers + b"Transfer-Encoding: chunked\r\n")
    assert pages(read(write(tmp_path, ".warc", sent + undone))) == [("u", page(3))] * 2


def sent(body: bytes, headers: bytes) -> bytes:
    return response("u", body, HTML + headers)


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


HALVES = gzip.compress(page(3)[:40]) + gzip.compress(page(3)[40:])
ZSTD = zstandard.ZstdCompressor().compress(page(3))
CODED = {
    "several gzip members": sent(HALVES, b"Content-Encoding: gzip\r\n"),
    "zstd": sent(ZSTD, b"Content-Encoding: zstd\r\n"),
    "two codings, the last one outside": sent(gzip.compress(ZSTD), b"Content-Encoding: zstd, gzip\r\n"),
    "gzip by the transfer": sent(chunked(gzip.compress(page(3))), b"Transfer-Encoding: gzip, chunked\r\n"),
    "zstd that was undone": sent(page(3), b"Content-Encoding: zstd\r\n"),
    "brotli that was undone": sent(page(3), b"Content-Encoding: br\r\n"),
    "no coding": sent(page(3), b"Content-Encoding: identity, utf-8, none\r\n"),
}


@pytest.mark.parametrize("name", CODED)
def test_codings_one_over_the_other_are_undone(tmp_path: Path, name: str) -> None:
    assert pages(read(write(tmp_path, ".warc", CODED[name]))) == [("u", page(3))]


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (b"\x0b\x02\x80" + b"\xe9" * 90, b"br"),
        (b"\x1f\x9d\x90", b"compress"),
        (ZSTD[:-9], b"zstd"),
        (b"\x78\x9c" + b"\xff" * 90, b"deflate"),
    ],
)
def test_a_coding_that_cannot_be_undone_is_no_text(tmp_path: Path, body: bytes, coding: bytes) -> None:
    found = read(write(tmp_path, ".warc", sent(body, b"Content-Encoding: " + coding + b"\r\n")))
    assert (pages(found), reasons(found)) == ([], {"broken_http": 1})


@pytest.mark.parametrize(
    "noise", [b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9, bytes(5000), b"%PDF-1.7\n" + bytes(range(256)) * 9]
)
def test_an_image_that_is_called_a_page_is_no_text(tmp_path: Path, noise: bytes) -> None:
    found = read(write(tmp_path, ".warc", response("u", noise) + RECORDS[2]))
    assert (pages(found), reasons(found)) == (EXPECTED[:1], {"binary": 1})


def test_a_page_that_zstd_inflates_without_end_is_too_large(tmp_path: Path) -> None:
    body = zstandard.ZstdCompressor().compress(b"<p>" + b"a" * 80_000_000)
    found = read(write(tmp_path, ".warc", sent(body, b"Content-Encoding: zstd\r\n")))
    assert reasons(found) == {"too_large": 1}


META = '<meta charset="shift_jis">日本語の文章です'
TEXT = "Größe, naïve café; 价格是一百元，质量很好。Привет, мир!"


@pytest.mark.parametrize(
    ("content", "stated", "text"),
    [
        (TEXT.encode(), "utf-8", TEXT),
        (TEXT.encode(), None, TEXT),
        (TEXT.encode(), "iso-8859-2", TEXT.encode().decode("iso-8859-2")),
        (b"\xef\xbb\xbf" + TEXT.encode(), "windows-1252", TEXT),
        (b"\xff\xfe" + TEXT.encode("utf-16-le"), None, TEXT),
        ("价格是一百元，质量很好。".encode("gbk"), "gb2312", "价格是一百元，质量很好。"),
        ("Größe “quoted”".encode("windows-1252"), "iso-8859-1", "Größe “quoted”"),
        ("Größe".encode("windows-1252"), "nonsense", "Größe"),
        (META.encode("shift_jis"), None, META),
        (("Привет, как дела? Это русский текст о погоде. " * 5).encode("windows-1251"), None, None),
    ],
)  # fmt: skip
def test_character_sets_are_found_as_browsers_find_them(content: bytes, stated: str | None, text: str | None) -> None:
    expected = text if text is not None else content.decode("windows-1251")
    assert decode(content, stated) == expected


def test_a_wrong_statement_is_passed_over_and_bad_bytes_are_marked() -> None:
    assert decode(TEXT.encode("gbk", "ignore"), "utf-8").startswith("Gr")
    assert "价格是一百元" in decode(("价格是一百元，质量很好。" * 5).encode("gbk"), "utf-8")
    assert decode(b'<meta charset="euc-jp">text \xff\xff', None).count("\ufffd") > 0


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_an_empty_file_has_no_records(tmp_path: Path, suffix: str) -> None:
    with open(write(tmp_path, suffix, b""), "rb") as stream:
        source = SourceSection(name="a", reader="warc", paths=["a"])
        assert list(read_warc(stream, Piece(0, 0, None), source, 1000)) == []
