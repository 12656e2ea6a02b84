"""Which files are inputs: what a pattern stands for, each once, none of the run's own; nothing is missed in silence."""

import gzip
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.config import SourceSection
from data_pipeline.inventory import WRITTEN, Piece, take_inventory
from data_pipeline.readers.base import Document, Rejected
from data_pipeline.readers.open import read_piece
from megatron_joy.errors import UserError, WorkError
from tests.data_pipeline.corpora import plain_user, run_inline, texts, write_jsonl, write_pipeline
from tests.data_pipeline.test_readers import pipeline, read_all


def text_source(*paths: Path | str, reader: str = "text") -> SourceSection:
    return SourceSection.model_validate({"name": "a", "reader": reader, "paths": list(map(str, paths))})


def test_a_file_that_is_spelled_in_several_ways_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    monkeypatch.chdir(tmp_path)
    spellings = ("a.txt", "./a.txt", f"{tmp_path}//a.txt", f"../{tmp_path.name}/a.txt", "link.txt", "*.txt", ".")
    assert [record.text for record in read_all(pipeline(text_source(*spellings))) if isinstance(record, Document)] == [
        b"text"
    ]
    assert [file.path for file in take_inventory(pipeline(text_source(*spellings))).inputs] == ["a.txt"]


def test_what_a_run_has_written_is_none_of_its_inputs(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(150))
    path = write_pipeline(tmp_path, tmp_path / "out", keep_work=True)
    path.write_text(path.read_text().replace("/*.jsonl", ""))
    engine = run_inline(path)
    assert {entry.name for entry in (tmp_path / "out").iterdir()} <= set(WRITTEN)
    assert take_inventory(engine.job.pipeline).inputs == engine.job.plan.inputs
    source = text_source(tmp_path / "out" / "*.jsonl", reader="jsonl")
    again = engine.job.pipeline.model_copy(update={"sources": [source]})
    with pytest.raises(UserError, match="matches no file but what this pipeline wrote itself"):
        take_inventory(again)


def test_a_link_to_nothing_that_a_glob_finds_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    records = read_all(pipeline(text_source(tmp_path / "*.txt")))
    assert [getattr(record, "reason", "document") for record in records] == ["document", "unreadable"]
    with pytest.raises(UserError, match=r"it is a link to .*nowhere, which is not there"):
        take_inventory(pipeline(text_source(tmp_path / "gone.txt")))


def test_a_pipe_is_no_input_and_never_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    assert len(read_all(pipeline(text_source(tmp_path)))) == 1
    with pytest.raises(UserError, match="it is a pipe or a device"):
        take_inventory(pipeline(text_source(tmp_path / "pipe.txt")))
    wanted = pipeline(text_source(tmp_path / "a.txt"))
    file = take_inventory(wanted).inputs[0]
    (tmp_path / "a.txt").unlink()
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(WorkError, match=r"a\.txt: no file any more"):
        list(read_piece(wanted, file, Piece(0, 0, None)))


@pytest.mark.parametrize("name", ["a.JSONL.GZ", "a.jsonl.gz", "a.Jsonl.Gz"])
def test_endings_count_in_any_case(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    for path in (tmp_path, tmp_path / name):
        wanted = pipeline(text_source(path, reader="jsonl"), shard_megabytes=1e-6)
        assert [record.text for record in read_all(wanted) if isinstance(record, Document)] == [b"one", b"two"]


BEGINNINGS = {
    "a.jsonl": gzip.compress(b'{"text": "one"}\n' * 50),
    "b.jsonl": b"\x28\xb5\x2f\xfd" + bytes(99),
    "c.jsonl.bz2": b"BZh91AY&SY" + bytes(99),
    "d.jsonl.xz": b"\xfd7zXZ\0" + bytes(99),
    "e.jsonl.lz4": b"\x04\x22\x4d\x18" + bytes(99),
    "f.zip": b"PK\x03\x04" + bytes(99),
    "g.jsonl.gz": b"\x28\xb5\x2f\xfd" + bytes(99),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_compressed_file_whose_name_does_not_say_so_is_one_record(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BEGINNINGS[name])
    # In pieces: only the first one says it.
    records = read_all(pipeline(text_source(tmp_path / name, reader="jsonl"), shard_megabytes=1e-5))
    assert [(record.reason, record.offset) for record in records if isinstance(record, Rejected)] == [("compressed", 0)]
    assert len(records) == 1


def test_a_file_that_is_written_to_without_growing_stops_the_task(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    wanted = pipeline(text_source(path))
    file = take_inventory(wanted).inputs[0]
    path.write_text("TEXT")
    os.utime(path, ns=(0, file.modified_ns + 1))
    with pytest.raises(WorkError, match=r"a\.txt: written to, expected no change"):
        list(read_piece(wanted, file, Piece(0, 0, None)))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; the test's own may not be one."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_files_and_folders_that_are_closed_to_us_are_put_aside(open_folder: Path) -> None:
    (open_folder / "a.txt").write_text("text")
    for name, rights in (("closed", 0), ("no_entry", 0o444)):
        (open_folder / name).mkdir()
        (open_folder / name / "b.txt").write_text("text b")
        (open_folder / name).chmod(rights)
    (open_folder / "c.txt").write_text("text c")
    (open_folder / "c.txt").chmod(0)
    try:
        with plain_user():
            records = read_all(pipeline(text_source(open_folder)))
    finally:
        for name in ("closed", "no_entry"):
            (open_folder / name).chmod(0o755)
    assert [getattr(record, "reason", "document") for record in records] == ["document", *["unreadable"] * 3]


def test_a_file_of_a_repository_that_is_closed_to_us_is_put_aside_alone(open_folder: Path) -> None:
    (open_folder / "a.py").write_text("import b\nprint(b.x)\n")
    (open_folder / "b.py").write_text("x = 1\n")
    (open_folder / "b.py").chmod(0)
    with plain_user():
        source = SourceSection(name="a", reader="repository", paths=[str(open_folder)], file_rules=False)
        records = read_all(pipeline(source))
    assert [getattr(record, "reason", "document") for record in records] == ["unreadable", "document"]
