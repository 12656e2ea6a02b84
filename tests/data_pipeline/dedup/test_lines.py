"""Spans of lines stay where they are first and go everywhere else; what is alone stays."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dedup.external import RowSorter
from data_pipeline.dedup.lines import (
    LINE_BITS,
    MOST_SPANS,
    SpanSettings,
    repeated_positions,
    span_rows,
    without_spans,
)

FOOTER = "Subscribe to our newsletter today\nAll rights reserved by the\n\n  publisher of  THIS page"
SPANS = SpanSettings(length=3, min_bytes=20)


def cleaned(texts: list[str], folder: Path, spans: SpanSettings = SPANS, memory_rows: int = 1000) -> list[str]:
    by_hash = RowSorter(folder / "spans", memory_rows)
    for number, text in enumerate(texts):
        by_hash.add(span_rows(number, text.encode(), spans))
    found: dict[int, list[int]] = {}
    for positions in repeated_positions(by_hash):
        for position in positions.tolist():
            found.setdefault(position >> LINE_BITS, []).append(position % MOST_SPANS)
    return [
        without_spans(text.encode(), np.array(found[number]), spans)[0].decode() if number in found else text
        for number, text in enumerate(texts)
    ]


def plain(texts: list[str], spans: SpanSettings) -> list[str]:
    """The same, held in memory, straight from the description."""
    seen: set[tuple[str, ...]] = set()
    result = []
    for text in texts:
        lines = text.split("\n")
        normal = [(number, " ".join(line.split()).casefold()) for number, line in enumerate(lines) if line.split()]
        gone: set[int] = set()
        for start in range(len(normal) - spans.length + 1):
            window = normal[start : start + spans.length]
            key = tuple(line for _, line in window)
            if len("\n".join(key).encode()) < spans.min_bytes:
                continue
            if key in seen:
                gone |= {number for number, _ in window}
            seen.add(key)
        result.append("\n".join(line for number, line in enumerate(lines) if number not in gone))
    return result


def test_a_footer_stays_in_its_first_document_only(tmp_path: Path) -> None:
    texts = [f"Story {n}\nof its {n}\n{FOOTER.upper() if n == 2 else FOOTER}\nend {n}" for n in range(3)]
    assert cleaned(texts, tmp_path) == [texts[0], "Story 1\nof its 1\n\nend 1", "Story 2\nof its 2\n\nend 2"]


def test_a_span_repeated_within_one_document_goes_too(tmp_path: Path) -> None:
    assert cleaned([f"{FOOTER}\nmiddle\n{FOOTER}"], tmp_path) == [f"{FOOTER}\nmiddle\n"]


def test_short_spans_and_shorter_runs_stay(tmp_path: Path) -> None:
    texts = [
        "{\n}\n{\n}",
        "{\n}\n{\n}",
        "one long line of text\nanother long line",
        "one long line of text\nanother long line",
    ]
    assert cleaned(texts, tmp_path) == texts


LINES = (
    "a",
    "B b",
    "b  B",
    "b\tb ",
    "\u3000b\u00a0b\x1f",
    "",
    " ",
    "\u2028\x85",
    "c\u0130",
    "ci\u0307",
    "dd",
    "\u00e9\u1e9e",
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(LINES), max_size=9), max_size=6),
    st.sampled_from([1, 5, 1000]),
)
def test_any_documents_equal_the_plain_way(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[str]], memory_rows: int
) -> None:
    texts = ["\n".join(lines) for lines in documents]
    spans = SpanSettings(length=2, min_bytes=3)
    found = cleaned(texts, tmp_path_factory.mktemp("lines"), spans, memory_rows)
    assert found == plain(texts, spans)


def test_words_end_where_python_says() -> None:
    """Each code point between two letters: a blank makes the same line as a space, anything else another one."""
    spans = SpanSettings(length=1, min_bytes=0)
    (space,) = span_rows(0, b"a b", spans)[:, 0]
    points = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000 and point != 10]
    hashes = span_rows(0, "\n".join(f"a{point}b" for point in points[:MOST_SPANS]).encode(), spans)[:, 0]
    assert [point for point, value in zip(points, hashes, strict=False) if value == space] == [
        point for point in points if point.isspace()
    ]
