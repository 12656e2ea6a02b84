"""Lines that the kernel takes are what orjson gives; whatever it doesn't take, orjson sees."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.config import SourceSection
from data_pipeline.inventory import Piece
from data_pipeline.native.library import kernels
from data_pipeline.readers import lines as module
from data_pipeline.readers.base import Document, Record, Rejected, excerpt
from data_pipeline.readers.lines import SLACK, read_lines

NAMES = ("text", "licence", "url")
SOURCE = SourceSection(name="a", reader="jsonl", paths=["x"], licence_field="licence", url_field="url")


def take(content: bytes, names: tuple[str, ...] = NAMES) -> list[tuple[bool, list[bytes | None]]]:
    """Each whole line of a content: whether it was taken, and its strings."""
    block = np.frombuffer(content + b"\xff" * SLACK, dtype=np.uint8)
    strings = np.zeros(len(content) + SLACK, dtype=np.uint8)
    rows = np.zeros((content.count(b"\n") + 1, 3 + 2 * len(names)), dtype=np.int64)
    joined = np.frombuffer("".join(names).encode(), dtype=np.uint8)
    ends = np.cumsum([len(name.encode()) for name in names], dtype=np.int64)
    found = kernels().joy_json_lines(block, len(content), joined, ends, len(names), strings, rows, len(rows))
    taken = []
    for row in rows[:found].tolist():
        places = zip(row[3::2], row[4::2], strict=True)
        taken.append((bool(row[2]), [strings[a:b].tobytes() if b >= 0 else None for a, b in places]))
    assert [row[1] for row in rows[:found].tolist()] == [i + 1 for i, byte in enumerate(content) if byte == 10]
    return taken


def wanted(line: bytes) -> list[bytes | None]:
    """What a whole parser gives for a line."""
    record = orjson.loads(line)
    found = [record.get(name) for name in NAMES]
    return [value.encode() if isinstance(value, str) else None for value in found]


def agrees(line: bytes) -> bool:
    """That a line is taken as a whole parser would, or left; returns whether it was taken."""
    ((taken, strings),) = take(line + b"\n")
    if taken:
        assert strings == wanted(line)
    return taken


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
RECORDS = st.dictionaries(st.sampled_from([*NAMES, "id", "meta", "te", "textual", "caf\u00e9"]), VALUES, max_size=6)
SPACES = st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", "\t:\r ")])


@settings(deadline=None, max_examples=600)
@given(RECORDS, st.text(min_size=1), st.booleans(), SPACES)
def test_any_record_is_what_a_whole_parser_gives(
    record: dict[str, Any], text: str, ascii_only: bool, spaces: tuple[str, str]
) -> None:
    agrees(json.dumps(record | {"text": text}, ensure_ascii=ascii_only, separators=spaces).encode("utf-8", "replace"))


PIECES = (
    *('{"text":', '{"text": "', '"', '"}', "}", "}}", "{", "[", "]", ",", ":", "1", "-", "-0", "01", "1.", ".5", "1.5"),
    *("1e5", "12345678901234567890", "true", "false", "null", "nul", "truest", "\\", "\\n", "\\u0041", "\\u00e9"),
    *(
        "\\u0000",
        "\\ud83d\\ude00",
        "\\ud83d",
        "\\ude00",
        "\\u12",
        "\\x",
        "\\/",
        '\\"',
        "text",
        '"url"',
        '"licence"',
        " ",
    ),
    *("\t", "\r", "\x00", "\x1f", "\x7f", "é", "中", "😀", "\u2028", "\ufeff", "long enough to fill a whole vector"),
)


@settings(deadline=None, max_examples=1500)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@example('{"text": "a", "text": "b"}')
@example('{"text": ["a"], "text": "b"}')
@example('{"te\\u0078t": "a"}')
@example('{"text": "a"} x')
@example('{"text": "a",}')
@example('{"a": {"b": [1, {"c": "d\\n"}]}, "text": "e"}')
def test_nothing_is_taken_that_a_whole_parser_refuses(line: str) -> None:
    agrees(line.encode())


@settings(deadline=None, max_examples=800)
@given(st.lists(st.binary(max_size=4), max_size=5))
@example([b"\xed\xa0\x80"])
@example([b"\xf4\x90\x80\x80"])
@example([b"\xc0\x80", b"\xe0\x80\x80", b"\xf0\x80\x80\x80"])
@example([b"\xe4\xb8"])
def test_bytes_that_are_not_utf8_are_left_alone(parts: list[bytes]) -> None:
    agrees(b'{"text": "sixteen plain...' + b"abc".join(parts).replace(b"\n", b"") + b'"}')


def test_plain_records_are_taken() -> None:
    """The kernel would be right if it never took a line: it would only be slow."""
    for record in (
        {"text": "plain"},
        {"text": 'quotes " and \\ and\nlines\ttabs / and é 中 😀', "url": "https://a.org/ü", "licence": None},
        {"id": 12, "meta": {"a": [1.5, -2, True, None, {"b": "c"}], "d": {}, "e": []}, "text": "x" * 1000},
        {"text": "\n\n  leading blanks"},
        {"text": "中文"},
    ):
        for ascii_only in (True, False):
            assert agrees(json.dumps(record, ensure_ascii=ascii_only).encode())


def test_no_white_space_of_python_is_taken_for_text_and_letters_are() -> None:
    points = [chr(point) for point in range(0x3100) if not 0xD800 <= point < 0xE000]
    blank = [point for point in points if point.isspace()]
    assert not any(agrees(json.dumps({"text": f" {point}\n"}).encode()) for point in blank)
    assert not any(chr(point).isspace() for point in range(0x3100, 0x110000) if not 0xD800 <= point < 0xE000)
    assert all(agrees(json.dumps({"text": f"\n{letter}"}).encode()) for letter in "aéЖאعहกაあア中한😀")


@pytest.mark.parametrize("text", ["", " \n\u3000", "\u0085\u2029", "a\0b", "\x1c"])
def test_texts_that_need_a_second_look_are_left(text: str) -> None:
    assert not agrees(json.dumps({"text": text}).encode())


class Broken(io.BytesIO):
    """A stream that gives a few bytes at a time and breaks behind them all."""

    def readinto1(self, buffer: Any) -> int:
        part = self.read(min(len(buffer), 7))
        if not part and len(buffer):
            raise EOFError("cut short")
        buffer[: len(part)] = part
        return len(part)


def plainly(content: bytes, limit: int) -> list[Record]:
    """What reading line by line gives."""
    found, offset = [], 0
    for line in content.splitlines(keepends=True):
        body = line.removesuffix(b"\n")
        if len(body) > limit:
            found.append(Rejected("too_large", offset, excerpt(line[: limit + 1])))
        elif (record := module._parse_line(line, offset, SOURCE)) is not None:
            found.append(record)
        offset += len(line)
    return found


@pytest.mark.parametrize("block", [64, 100, 1000])
@pytest.mark.parametrize("limit", [40, 90, 400])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_blocks_and_pieces_of_any_size_give_every_line_once(
    block: int, limit: int, end: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "MOST_LINES", 3)
    parts = [json.dumps({"text": "a" * (7 * n % 110), "url": f"u{n}"}).encode() for n in range(60)]
    parts[7:7] = [b"", b"   ", b'{"text": 1}', b'\xff{"text": "a"}', b"{", b"x" * 700, b'{"text": "\xc3\xa9"}']
    content = b"\xef\xbb\xbf" + b"\n".join(parts) + end
    expected = plainly(content, limit)
    assert {type(record) for record in expected} == {Document, Rejected}
    for step in (1000, 37, len(content) + 1):
        found = []
        for start in range(0, len(content), step):
            found += read_lines(io.BufferedReader(io.BytesIO(content)), Piece(0, start, start + step), SOURCE, limit)
        assert found == expected


def test_lines_before_a_break_are_kept_and_the_break_has_its_place(tmp_path: Path) -> None:
    whole = b"".join(json.dumps({"text": f"text {n}"}).encode() + b"\n" for n in range(5))
    found = list(read_lines(Broken(whole + b'{"text": "cut'), Piece(0, 0, None), SOURCE, 1000))
    assert found == [*plainly(whole, 1000), Rejected("broken_compression", len(whole), "cut short")]


@pytest.mark.parametrize(
    "fields", [{"url_field": "url"}, {"licence_field": "url"}, {"url_field": "", "licence_field": ""}]
)
def test_a_text_field_without_a_name_is_read_and_no_other(fields: dict[str, str]) -> None:
    """The empty string is a key like any other; the first field that has a name must not become the text."""
    source = SourceSection(name="a", reader="jsonl", paths=["x"], text_field="", **fields)
    content = b'{"url": "https://a.org/", "": "its text"}\n{"url": "https://a.org/", "text": "not asked for"}\n'
    first, second = read_lines(io.BufferedReader(io.BytesIO(content)), Piece(0, 0, None), source, 1000)
    assert isinstance(first, Document) and first.text == b"its text"
    assert isinstance(second, Rejected) and second.reason == "missing_text"
