"""Parquet, pages and Markdown: rows and pages as other libraries wrote them; any bytes are put aside, never fatal."""

import gzip
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.config import SourceSection
from data_pipeline.inventory import Piece, take_inventory
from data_pipeline.readers.base import REASONS, Document, Record, Rejected
from data_pipeline.readers.open import read_piece
from megatron_joy.errors import UserError
from tests.data_pipeline.test_readers import pipeline, read_all


def texts(records: list[Record]) -> list[str]:
    return [record.text.decode() for record in records if isinstance(record, Document)]


def reasons(records: list[Record]) -> Counter[str]:
    return Counter(record.reason for record in records if isinstance(record, Rejected))


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def source(path: Path, reader: str = "parquet", **more: Any) -> SourceSection:
    return SourceSection.model_validate({"name": "a", "reader": reader, "paths": [str(path)], **more})


@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"use_dictionary": False}, {"row_group_size": 7}])
def test_parquet_rows_are_documents_with_their_columns(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = [f"text {number} äöü 文" for number in range(30)]
    columns = {"id": list(range(30)), "text": rows, "l": ["MIT", None] * 15, "u": ["https://e.org/"] * 30}
    path = parquet(tmp_path / "a.parquet", columns, **options)
    records = read_all(pipeline(source(path, licence_field="l", url_field="u")))
    assert texts(records) == rows
    assert [record.offset for record in records] == list(range(30))
    assert [record.licence for record in records if isinstance(record, Document)] == ["MIT", None] * 15
    assert {record.url for record in records if isinstance(record, Document)} == {"https://e.org/"}


def test_parquet_is_cut_at_row_groups_and_each_row_is_read_once(tmp_path: Path) -> None:
    rows = [f"text {number} " + "x" * (number % 40) for number in range(500)]
    path = parquet(tmp_path / "a.parquet", {"text": rows}, row_group_size=20, use_dictionary=False, compression="none")
    wanted = pipeline(source(path), shard_megabytes=0.003)
    assert len(take_inventory(wanted).tasks) > 4
    assert read_all(wanted) == read_all(pipeline(source(path)))
    assert texts(read_all(wanted)) == rows


def test_parquet_rows_without_usable_text_are_put_aside(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": ["good", None, "", " \n", "x" * 2000, "last"]})
    records = read_all(pipeline(source(path), max_document_megabytes=0.001))
    assert texts(records) == ["good", "last"]
    assert reasons(records) == {"missing_text": 1, "empty": 2, "too_large": 1}
    binary = parquet(tmp_path / "b.parquet", {"text": [b"bytes", b"caf\xe9"]})
    assert reasons(read_all(pipeline(source(binary)))) == {"not_utf8": 1}
    nuls = parquet(tmp_path / "c.parquet", {"text": ["\0" * 500, "xy\0\0\0", "x\0", "good"]})
    assert (texts(read_all(pipeline(source(nuls)))), reasons(read_all(pipeline(source(nuls))))) == (
        ["x\0", "good"],
        {"binary": 2},
    )


def test_a_broken_row_group_says_which_rows_are_lost(tmp_path: Path) -> None:
    rows = [f"text {number} " + "x" * 40 for number in range(30)]
    path = parquet(tmp_path / "a.parquet", {"text": rows}, row_group_size=10, use_dictionary=False, compression="zstd")
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[group.data_page_offset : group.data_page_offset + 8] = b"\xff" * 8
    path.write_bytes(content)
    records = read_all(pipeline(source(path)))
    (lost,) = [record for record in records if isinstance(record, Rejected)]
    assert texts(records) == rows[:10] + rows[20:]
    assert (lost.reason, lost.offset) == ("broken_parquet", 10)
    assert lost.excerpt.startswith("rows 10 to 19: ")


@pytest.mark.parametrize(
    ("columns", "more", "says"),
    [
        ({"content": ["a"], "id": [1]}, {}, r"a\.parquet: no column text; it has content, id: set text_field"),
        ({"text": ["a"]}, {"url_field": "url"}, "no column url; it has text"),
        ({"text": [1, 2]}, {}, "column text holds int64, expected strings"),
    ],
)
def test_a_parquet_file_without_the_columns_is_one_line(
    tmp_path: Path, columns: dict[str, Any], more: dict[str, str], says: str
) -> None:
    path = parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError, match=says) as error:
        read_all(pipeline(source(path, **more)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int32(), pa.string()), pa.large_string(), pa.string_view()])
def test_every_arrow_type_of_strings_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    rows = ["one", "two", "one", None]
    path = parquet(tmp_path / "a.parquet", {"text": pa.array(rows, pa.string()).cast(kind)})
    found = read_all(pipeline(source(path)))
    assert (texts(found), reasons(found)) == (["one", "two", "one"], {"missing_text": 1})


def test_a_column_of_nothing_but_nulls_has_no_text(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": pa.nulls(3)})
    assert reasons(read_all(pipeline(source(path)))) == {"missing_text": 3}


def test_two_columns_of_one_name_are_one_line(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: several columns are called text"):
        read_all(pipeline(source(tmp_path / "a.parquet")))


def test_long_rows_are_decoded_a_few_at_a_time(tmp_path: Path) -> None:
    """A batch of 512 rows of 2 MB would be a gigabyte."""
    rows = [f"{number} " + "x" * 2_000_000 for number in range(60)]
    path = parquet(tmp_path / "a.parquet", {"text": rows}, use_dictionary=False, compression="zstd", write_batch_size=1)
    wanted, before = pipeline(source(path), max_document_megabytes=3), pa.total_allocated_bytes()
    inventory, most, sizes = take_inventory(wanted), 0, []
    for record in read_piece(wanted, inventory.inputs[0], Piece(0, 0, None)):
        assert isinstance(record, Document)
        sizes.append(len(record.text))
        most = max(most, pa.total_allocated_bytes() - before)
    assert sizes == list(map(len, rows))
    assert most < 60_000_000


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_parquet_file_is_put_aside(tmp_path: Path, share: float) -> None:
    content = parquet(tmp_path / "a.parquet", {"text": ["text"] * 1000}).read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: max(1, int(len(content) * share))])
    records = read_all(pipeline(source(tmp_path / "a.parquet")))
    assert (texts(records), reasons(records)) == ([], {"broken_parquet": 1})


@settings(deadline=None, max_examples=60)
@given(st.integers(4, 4000), st.integers(1, 255))
def test_a_damaged_parquet_file_never_stops_the_reader(
    tmp_path_factory: pytest.TempPathFactory, place: int, flip: int
) -> None:
    path = tmp_path_factory.mktemp("damage") / "a.parquet"
    rows = [f"text {number}" for number in range(200)]
    content = bytearray(parquet(path, {"text": rows}, row_group_size=50, compression="zstd").read_bytes())
    content[place % len(content)] ^= flip
    path.write_bytes(content)
    with suppress(UserError):  # the flip changed a column's name or type
        records = read_all(pipeline(source(path)))
        assert all(isinstance(record, Document) or record.reason in REASONS for record in records)


def test_pages_of_a_pdf_become_one_document(tmp_path: Path) -> None:
    rows = [
        {"pages": ["first page\n", "second page"], "u": "https://e.org/a.pdf"},
        {"pages": [{"page": 1, "text": "one"}, {"page": 2, "text": "two"}]},
        {"pages": []},
        {"pages": "no list"},
        {"pages": ["good", None]},
        {"other": ["x"]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_all(pipeline(source(path, "pages", text_field="pages", url_field="u")))
    assert texts(records) == ["first page\n\nsecond page", "one\n\ntwo"]
    assert reasons(records) == {"empty": 1, "missing_text": 3}
    assert [record.url for record in records if isinstance(record, Document)] == ["https://e.org/a.pdf", None]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"---\ntitle: x\ntags: [a]\n---\n\n# Head\n\ntext\n", "# Head\n\ntext\n"),
        (b"+++\r\ntitle = 1\r\n+++\r\ntext", "text"),
        (b"# Head\n---\nnot front matter\n---\n", "# Head\n---\nnot front matter\n---\n"),
        (b"---\nnever closed\n", "---\nnever closed\n"),
        (b"---\ntitle: only\n---\n", None),
    ],
)
def test_markdown_loses_its_front_matter(tmp_path: Path, content: bytes, text: str | None) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_bytes(content)
    (tmp_path / "b.txt").write_text("another ending")
    records = read_all(pipeline(source(tmp_path, "markdown")))
    assert texts(records) == ([] if text is None else [text])
    assert reasons(records) == ({} if text is not None else {"empty": 1})


def test_two_files_of_one_name_in_two_folders_are_two_inputs(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(f"text of {folder}")
    wanted = pipeline(source(tmp_path, "text"))
    assert texts(read_all(wanted)) == ["text of x", "text of y"]
    assert len({file.path for file in take_inventory(wanted).inputs}) == 2


SUFFIXES = {
    "jsonl": ".jsonl",
    "pages": ".jsonl",
    "text": ".txt",
    "markdown": ".md",
    "code": ".py",
    "parquet": ".parquet",
}


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(SUFFIXES)), st.sampled_from(["", ".gz", ".zst"]), st.binary(min_size=1, max_size=400))
@example("jsonl", "", b'{"text": "\\u0000\\u0000"}\n')
@example("jsonl", "", b"\x00" * 300)
@example("jsonl", ".gz", gzip.compress(b'{"text": "a"}\n')[:-5])
@example("jsonl", ".zst", b"\x28\xb5\x2f\xfd\x00")
@example("pages", "", b'{"text": ["a", 3]}')
@example("text", "", "\u3000\u00a0".encode())
@example("markdown", "", b"---\n---\n")
@example("parquet", "", b"PAR1PAR1")
@example("parquet", "", b"PAR1" + b"\xff" * 40 + b"\x28\x00\x00\x00PAR1")
def test_any_bytes_are_documents_or_put_aside(
    tmp_path_factory: pytest.TempPathFactory, reader: str, packed: str, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / f"a{SUFFIXES[reader]}{packed if reader != 'parquet' else ''}"
    path.write_bytes(content)
    for record in read_all(pipeline(source(path, reader), max_document_megabytes=0.0002)):
        if isinstance(record, Rejected):
            assert record.reason in REASONS
            assert json.dumps(record.excerpt)
        else:
            assert record.text.decode().strip()


def test_a_line_of_many_megabytes_is_passed_over_in_bounded_memory(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "a.jsonl"
    with open(path, "wb") as stream:
        stream.write(b'{"text": "')
        for _ in range(100):
            stream.write(b"x" * 1_000_000)
        stream.write(b'"}\n{"text": "after"}\n')
    wanted = pipeline(source(path, "jsonl"), shard_megabytes=1000.0)
    tracemalloc.start()
    records = read_all(wanted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (texts(records), reasons(records)) == (["after"], {"too_large": 1})
    assert peak < 10_000_000
