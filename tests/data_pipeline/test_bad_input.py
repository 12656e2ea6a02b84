"""What a run does with bad input from its first task to its last: one line or a record put aside, and nothing lost."""

import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import SourceSection, load_pipeline
from data_pipeline.engine import check_owner
from data_pipeline.finish import tidy
from data_pipeline.inventory import Piece
from data_pipeline.readers.lines import read_lines
from data_pipeline.run import run_pipeline
from data_pipeline.tokenizer import save_tokenizer, train_tokenizer
from megatron_joy.data.ledger import load_ledger
from megatron_joy.data.manifest import load_manifest
from megatron_joy.data.verify import verify
from megatron_joy.errors import UserError, WorkError
from megatron_joy.report.data_page import write_data_page
from tests.data_pipeline.corpora import (
    digests,
    plain_user,
    plan_inline,
    run_inline,
    texts,
    write_jsonl,
    write_pipeline,
)

SPECIAL = ["<|endoftext|>", "<|pad|>"]
NULS = "\0" * 200_000


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "in" / "a.jsonl", texts(150))
    return tmp_path / "in"


def joy(*arguments: str, largest_file: int | None = None) -> "subprocess.CompletedProcess[str]":
    """`joy` with these arguments; largest_file: bytes at which writing fails, as on a full disk."""

    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.run(
        [sys.executable, "-m", "megatron_joy.cli.main", *arguments],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        preexec_fn=limit,
    )


def test_a_run_over_broken_files_puts_each_aside_and_keeps_every_whole_record(corpus: Path, tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({"text": f"zipped {text}"}) + "\n" for text in texts(300, 1)).encode())
    (corpus / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (corpus / "plain.jsonl.gz").write_bytes(b'{"text": "not compressed"}\n')
    (corpus / "nothing.jsonl").touch()
    (corpus / "noise.jsonl").write_bytes(bytes(range(256)).replace(b"\n", b""))
    (corpus / "long.jsonl").write_bytes(b"x" * 2_000_000 + b"\n" + json.dumps({"text": "behind a long line"}).encode())
    write_jsonl(corpus / "nul.jsonl", [NULS, f"x{NULS}y", "one \0 alone"])
    pipeline = write_pipeline(corpus, tmp_path / "out", "max_document_megabytes = 1.5", shard_megabytes=3)
    pipeline.write_text(pipeline.read_text().replace("*.jsonl", "*"))
    pipeline = pipeline.rename(tmp_path / "p.toml")
    done = joy("data", "run", str(pipeline), "--workers", "1")
    assert done.returncode == 0, done.stderr
    aside = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_bytes().splitlines()]
    found = Counter((Path(row["file"]).name, row["reason"]) for row in aside)
    assert found == {
        ("cut.jsonl.gz", "broken_compression"): 1,
        ("plain.jsonl.gz", "broken_compression"): 1,
        ("noise.jsonl", "not_utf8"): 1,
        ("long.jsonl", "too_large"): 1,
        ("nul.jsonl", "binary"): 2,
    }
    kept = sum(load_manifest(tmp_path / "out" / split).totals.documents for split in ("train", "validation"))
    first = load_ledger(tmp_path / "out").steps[0]
    assert first.documents_in == first.documents_out + len(aside)
    assert kept > len(texts(150)) + 100
    assert [verify(tmp_path / "out" / split).problems for split in ("train", "validation")] == [[], []]


class Measured:
    """A file that knows how many bytes were read from it."""

    def __init__(self, path: Path) -> None:
        self._stream, self.bytes = open(path, "rb"), 0  # noqa: SIM115 (closed with the test's process)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def readline(self, size: int) -> bytes:
        part = self._stream.readline(size)
        self.bytes += len(part)
        return part


def test_a_line_of_many_pieces_is_read_once(tmp_path: Path) -> None:
    path, size, step, limit = tmp_path / "a.jsonl", 2_000_000, 20_000, 5000
    path.write_bytes(b"x" * size + b"\n" + b'{"text": "last"}\n')
    stream: Any = Measured(path)
    source = SourceSection(name="a", reader="jsonl", paths=[str(path)])
    records = [
        record
        for start in range(0, size + 100, step)
        for record in read_lines(stream, Piece(0, start, start + step), source, limit)
    ]
    assert [getattr(record, "reason", "document") for record in records] == ["too_large", "document"]
    assert stream.bytes <= size + (size // step + 2) * 2 * limit


@pytest.fixture
def given(corpus: Path, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A pipeline with a given tokenizer, run to its end, and the tokenizer's folder."""
    folder = tmp_path / "tokenizer"
    save_tokenizer(train_tokenizer(texts(100), 300, SPECIAL), SPECIAL, SPECIAL[0], folder)
    pipeline = write_pipeline(corpus, tmp_path / "out", tokenizer=f'folder = "{folder}"')
    tidy(run_inline(pipeline).job)
    return pipeline, folder


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_changed_between_runs_makes_its_shards_again(given: tuple[Path, Path], file: str) -> None:
    pipeline, folder = given
    out = pipeline.parents[1] / "out"
    before = load_manifest(out / "train").tokenizer
    if file == "tokenizer.json":
        save_tokenizer(train_tokenizer(texts(100), 310, SPECIAL), SPECIAL, SPECIAL[0], folder)
    else:
        content = (folder / file).read_text()
        (folder / file).write_text(content.replace(SPECIAL[0], SPECIAL[1]))
    run_inline(pipeline)
    after = load_manifest(out / "train").tokenizer
    assert (after.vocab_size, after.eod_token) == (
        (310, SPECIAL[0]) if file == "tokenizer.json" else (before.vocab_size, SPECIAL[1])
    )
    assert verify(out / "train").problems == []


@pytest.mark.parametrize("content", [None, b"{"])
def test_a_tokenizer_that_is_gone_or_broken_leaves_what_was_published(
    given: tuple[Path, Path], content: bytes | None
) -> None:
    pipeline, folder = given
    out = pipeline.parents[1] / "out"
    before = digests(out)
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: (cannot be read|not JSON)"):
        run_pipeline(str(pipeline))
    assert digests(out) == before
    assert verify(out / "train").problems == []


def test_a_mistake_found_while_reading_leaves_what_was_published(given: tuple[Path, Path]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pipeline, _ = given
    out = pipeline.parents[1] / "out"
    before = digests(out)
    pq.write_table(pa.table({"content": ["x"]}), pipeline.parent / "b.parquet")
    source = f'[[sources]]\nname = "b"\nreader = "parquet"\npaths = ["{pipeline.parent}/b.parquet"]\n[tokenizer]'
    pipeline.write_text(pipeline.read_text().replace("[tokenizer]", source))
    with pytest.raises(UserError, match="no column text; it has content"):
        run_inline(pipeline)
    assert digests(out) == before
    assert verify(out / "train").problems == []


def test_another_tokenizer_in_the_output_folder_stops_the_task(corpus: Path, tmp_path: Path) -> None:
    engine = plan_inline(write_pipeline(corpus, tmp_path / "out"))
    for stage, shards in engine.unfinished():
        if stage == "write":
            path = tmp_path / "out" / "tokenizer" / "tokenizer.json"
            path.write_bytes(path.read_bytes().replace(b"<|pad|>", b"<|bad|>"))
            with pytest.raises(WorkError, match="not the tokenizer that this run prepared"):
                engine.run_task(stage, shards[0])
            return
        for shard in shards:
            engine.run_task(stage, shard)


def test_what_a_killed_worker_left_half_written_is_gone_when_the_run_ends(corpus: Path, tmp_path: Path) -> None:
    engine = run_inline(write_pipeline(corpus, tmp_path / "out", keep_work=True))
    left = tmp_path / "out" / "train" / ".shard_00000.bin.partial-4242"
    left.write_bytes(b"half")
    tidy(engine.job)
    assert not left.exists()
    assert verify(tmp_path / "out" / "train").problems == []


def test_shards_without_a_plan_are_somebody_elses(corpus: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "out" / "train" / "shard_00099.bin"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"precious")
    with pytest.raises(UserError, match="holds shards of unknown origin"):
        run_pipeline(str(write_pipeline(corpus, tmp_path / "out")))
    assert foreign.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["work/read/notes.txt", "tokenizer/tokenizer.json", "quarantine.jsonl"])
def test_what_a_run_would_write_over_and_did_not_write_itself_stays(corpus: Path, tmp_path: Path, name: str) -> None:
    own = tmp_path / "out" / name
    own.parent.mkdir(parents=True)
    own.write_text("precious")
    with pytest.raises(UserError, match=f"holds {name.partition('/')[0]}, which no run of ours has left"):
        run_pipeline(str(write_pipeline(corpus, tmp_path / "out")))
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [own]
    assert own.read_text() == "precious"


def test_a_run_that_died_before_its_plan_was_written_goes_on(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "work").mkdir(parents=True)
    (tmp_path / "out" / "work" / "lock").touch()
    (tmp_path / "out" / "work" / "pipeline.json").write_text("{}")  # written just before it
    (tmp_path / "out" / "work" / ".plan.json.partial-1").write_text("{")
    tidy(run_inline(write_pipeline(corpus, tmp_path / "out")).job)
    assert verify(tmp_path / "out" / "train").problems == []


@pytest.mark.parametrize("content", [b"", b'{"pipeline": "tiny"}'])
def test_a_damaged_plan_is_one_line(given: tuple[Path, Path], content: bytes) -> None:
    pipeline, _ = given
    out = pipeline.parents[1] / "out"
    before = digests(out)
    (out / "work" / "plan.json").write_bytes(content)
    with pytest.raises(UserError, match=r"plan\.json: damaged, no plan of a run"):
        run_pipeline(str(pipeline))
    assert digests(out) == before


@pytest.mark.parametrize("stage", ["read", "tokenizer", "write", "finish"])
def test_a_damaged_record_is_a_task_that_is_not_done(given: tuple[Path, Path], stage: str) -> None:
    pipeline, _ = given
    out = pipeline.parents[1] / "out"
    before = digests(out)
    (out / "work" / "tasks" / stage / "00000.json").write_bytes(b"[]")
    run_inline(pipeline)
    assert digests(out) == before


PUBLISHED = [
    *("tokenizer/tokenizer.json", "train/tokenizer/tokenizer.json", "train/manifest.json", "quarantine.jsonl"),
    *("train/shard_00000.idx", "train/shard_00000.documents.jsonl.zst"),
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_that_is_gone_is_made_again(given: tuple[Path, Path], name: str) -> None:
    pipeline, _ = given
    out = pipeline.parents[1] / "out"
    before = digests(out)
    (out / name).unlink()
    run_inline(pipeline)
    assert digests(out) == before


def test_an_output_folder_that_is_closed_to_us_is_one_line(corpus: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "closed"
        folder.mkdir()
        folder.chmod(0)
        pipeline = load_pipeline(str(write_pipeline(corpus, folder / "out")))
        try:
            with plain_user(), pytest.raises(UserError, match=r"out: cannot be read \(Permission denied\)"):
                check_owner(pipeline)
        finally:
            folder.chmod(0o755)


def test_a_full_disk_behind_the_output_is_told(given: tuple[Path, Path]) -> None:
    pipeline, _ = given
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_joy.cli.main", "data", "stats", str(pipeline.parents[1] / "out")],
            env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "error: writing: No space left on device; mend it and run again\n")


def test_a_report_takes_no_place_but_a_files(given: tuple[Path, Path], tmp_path: Path) -> None:
    pipeline, _ = given
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="is there and no file, expected a page to write"):
            write_data_page(pipeline.parents[1] / "out", place)
    assert (tmp_path / "pipe").is_fifo()


def test_a_disk_that_takes_no_more_ends_the_run_with_one_line_that_names_the_folder(
    corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pipeline = write_pipeline(corpus, out)
    arguments = ("data", "run", str(pipeline), "--workers", "1")
    stopped = joy(*arguments, largest_file=10_000)
    (line,) = [line for line in stopped.stderr.splitlines() if line.startswith("error:")]
    assert stopped.returncode == 1
    assert f"{out}: File too large; mend it and run again" in line
    assert "Traceback" not in stopped.stderr
    assert not list(out.rglob(".*partial*"))
    assert not (out / "train" / "manifest.json").exists()
    assert joy(*arguments).returncode == 0
    run_inline(pipeline, f"output.folder={tmp_path / 'undisturbed'}")
    assert digests(out) == digests(tmp_path / "undisturbed")
