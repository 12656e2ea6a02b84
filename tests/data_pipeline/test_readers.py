"""Readers: every record is a document or put aside with file, offset and reason; never fatal, never silent."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.code.signals import REASONS as CODE_REASONS
from data_pipeline.config import Pipeline, SourceSection
from data_pipeline.inventory import Piece, take_inventory
from data_pipeline.readers.base import REASONS, Document, Record, Rejected
from data_pipeline.readers.open import read_piece
from megatron_joy.errors import UserError, WorkError

MEGABYTE = 1_000_000


def pipeline(source: SourceSection, shard_megabytes: float = 1.0, max_document_megabytes: float = 1.0) -> Pipeline:
    return Pipeline.model_validate(
        {
            "name": "p",
            "sources": [source],
            "tokenizer": {"vocab_size": 300},
            "output": {"folder": "x", "shard_megabytes": shard_megabytes},
            "max_document_megabytes": max_document_megabytes,
        }
    )


def read_all(wanted: Pipeline) -> list[Record]:
    inventory = take_inventory(wanted)
    pieces = [piece for task in inventory.tasks for piece in task]
    return [record for piece in pieces for record in read_piece(wanted, inventory.inputs[piece.input], piece)]


def jsonl(path: Path, content: bytes, **more: float) -> list[Record]:
    path.write_bytes(content)
    return read_all(pipeline(SourceSection(name="a", reader="jsonl", paths=[str(path)]), **more))


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def test_each_bad_record_has_its_reason_and_offset_and_the_good_ones_stay(tmp_path: Path) -> None:
    parts = [
        (line("first"), None),
        (b'{"text": "caf\xe9"}\n', "not_utf8"),
        (b'{"text": \n', "broken_json"),
        (b'{"txt": "x"}\n', "missing_text"),
        (b'{"text": 3}\n', "missing_text"),
        (b'["text"]\n', "missing_text"),
        (b'{"text": "\\ud800"}\n', "broken_json"),
        (line(""), "empty"),
        (line(" \n\t\u3000"), "empty"),
        (line("x" * 2000), "too_large"),
        (line("\0" * 100), "binary"),
        (line("x" + "\0" * 100), "binary"),
        (line("last")[:-1], None),
    ]
    records = jsonl(tmp_path / "a.jsonl", b"".join(part for part, _ in parts), max_document_megabytes=0.001)
    offset, expected = 0, []
    for part, reason in parts:
        expected.append((offset, reason))
        offset += len(part)
    found = [(record.offset, record.reason if isinstance(record, Rejected) else None) for record in records]
    assert found == expected
    assert [record.text for record in records if isinstance(record, Document)] == [b"first", b"last"]


def test_every_reason_has_an_explanation() -> None:
    folder = Path(__file__).parents[2] / "data_pipeline" / "readers"
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    of_files = {f"file_{reason}" for reason in CODE_REASONS}  # as the rules of source code name them
    assert all(source.count(f'"{reason}"') >= 2 for reason in REASONS.keys() - of_files)
    assert of_files <= REASONS.keys()


def test_blank_lines_are_no_records_and_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    records = jsonl(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + line("a") + b"\n \r\n" + line("b").replace(b"\n", b"\r\n"))
    assert [record.text for record in records if isinstance(record, Document)] == [b"a", b"b"]
    assert len(records) == 2


def test_licence_comes_from_its_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "l": "MIT"}\n{"text": "b", "l": 3}\n{"text": "c"}\n')
    source = SourceSection(name="a", reader="jsonl", paths=[str(tmp_path)], licence_field="l", licence="CC0")
    records = read_all(pipeline(source))
    assert [record.licence for record in records if isinstance(record, Document)] == ["MIT", None, None]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=30), max_size=30), st.integers(1, 200))
def test_a_file_cut_anywhere_gives_the_same_records_once(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], target: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    content = b"\xef\xbb\xbf" + b"".join(line(text) for text in [*documents, "last"])
    whole = jsonl(path, content)
    pieces = take_inventory(pipeline(SourceSection(name="a", reader="jsonl", paths=[str(path)]), target / MEGABYTE))
    assert len(pieces.tasks) >= min(len(content) // (2 * target), 2)
    assert jsonl(path, content, shard_megabytes=target / MEGABYTE) == whole
    assert len(whole) == len(documents) + 1


COMPRESSORS = {".gz": lambda content: gzip.compress(content, mtime=0), ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_read_alike_in_one_frame_or_several(tmp_path: Path, suffix: str) -> None:
    lines = [line(f"text {number}") for number in range(5000)]
    plain = jsonl(tmp_path / "a.jsonl", b"".join(lines))
    compress = COMPRESSORS[suffix]
    for name, parts in (("one", [b"".join(lines)]), ("two", [b"".join(lines[:99]), b"".join(lines[99:])])):
        content = b"".join(map(compress, parts))
        assert jsonl(tmp_path / f"{name}.jsonl{suffix}", content) == plain


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(COMPRESSORS)), st.floats(0.02, 0.999))
def test_a_compressed_file_cut_anywhere_keeps_its_whole_records_and_says_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, share: float
) -> None:
    import random

    chance = random.Random(3)
    lines = [line("".join(chance.choices("abcdefgh ", k=200)) + str(number)) for number in range(2000)]
    folder = tmp_path_factory.mktemp("cut")
    plain = jsonl(folder / "a.jsonl", b"".join(lines))
    content = COMPRESSORS[suffix](b"".join(lines))
    cut = content[: max(1, min(int(len(content) * share), len(content) - 1))]
    *whole, last = jsonl(folder / f"b.jsonl{suffix}", cut)
    assert isinstance(last, Rejected)
    assert last.reason == "broken_compression"
    assert whole == plain[: len(whole)]


def test_garbage_in_a_compressed_file_is_put_aside(tmp_path: Path) -> None:
    for suffix in COMPRESSORS:
        (record,) = jsonl(tmp_path / f"a.jsonl{suffix}", b"this is not compressed\n" * 100)
        assert isinstance(record, Rejected)
        assert record.reason == "broken_compression"


def test_text_files_and_source_trees_are_documents_by_their_endings(tmp_path: Path) -> None:
    files = {
        "a.txt": b"text",
        "sub/b.md": b"\xef\xbb\xbfmarkdown",
        "sub/c.py": b"code = 1\n",
        ".git/d.txt": b"hidden",
        "node_modules/e.md": b"foreign",
        "f.png": b"\x89PNG",
        "bad.txt": b"caf\xe9",
        "nul.txt": b"a\0b",
        "empty.txt": b" \n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link.txt").symlink_to("/etc/hostname")
    records = read_all(pipeline(SourceSection(name="a", reader="text", paths=[str(tmp_path)])))
    assert [r.text for r in records if isinstance(r, Document)] == [b"text", b"markdown"]
    assert sorted(r.reason for r in records if isinstance(r, Rejected)) == ["binary", "empty", "not_utf8"]
    records = read_all(pipeline(SourceSection(name="a", reader="code", paths=[str(tmp_path)])))
    assert [r.text for r in records if isinstance(r, Document)] == [b"markdown", b"code = 1\n"]


def test_a_file_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    import os

    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as stream:
        stream.write(b"text")
    wanted = pipeline(SourceSection(name="a", reader="text", paths=[str(tmp_path)]))
    assert [record.text for record in read_all(wanted) if isinstance(record, Document)] == [b"text"]
    assert take_inventory(wanted).inputs[0].path.endswith("caf\\xe9.txt")


def test_a_file_that_vanishes_is_put_aside_and_one_that_changes_stops_the_task(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    wanted = pipeline(SourceSection(name="a", reader="text", paths=[str(tmp_path)]))
    file = take_inventory(wanted).inputs[0]
    path.write_text("longer text")
    with pytest.raises(WorkError, match=r"a\.txt: 11 bytes, expected 4: it changed"):
        list(read_piece(wanted, file, Piece(0, 0, None)))
    path.unlink()
    (record,) = read_piece(wanted, file, Piece(0, 0, None))
    assert isinstance(record, Rejected)
    assert record.reason == "unreadable"


@pytest.mark.parametrize("paths", [["nothing/*.txt"], ["nowhere"], ["."]])
def test_paths_that_match_nothing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"sources\.0\.paths: .* matches no file"):
        take_inventory(pipeline(SourceSection(name="a", reader="text", paths=paths)))


def test_files_without_a_byte_are_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="empty corpus, 1 input files with 0 bytes"):
        take_inventory(pipeline(SourceSection(name="a", reader="text", paths=[str(tmp_path)])))


def test_a_cap_takes_a_fixed_sample_below_its_size(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number}.txt").write_text("x" * 1000)
    source = SourceSection(name="a", reader="text", paths=[str(tmp_path)], max_megabytes=0.01)
    first, second = (take_inventory(pipeline(source)) for _ in range(2))
    assert first == second
    assert (len(first.inputs), first.text_bytes) == (10, 10_000)
    assert len({file.path for file in first.inputs} & {str(tmp_path / f"{n}.txt") for n in range(10)}) < 10


def test_a_file_that_two_globs_match_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    paths = [str(tmp_path), f"{tmp_path}/*.txt", f"{tmp_path}/a.txt"]
    assert len(read_all(pipeline(SourceSection(name="a", reader="text", paths=paths)))) == 1
