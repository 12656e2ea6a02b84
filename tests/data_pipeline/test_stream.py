"""Without a shuffle: one pass, the order of the inputs, the split of the shuffled run, accounts that close."""

import json
import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_pipeline import write
from data_pipeline.config import load_pipeline
from data_pipeline.encode import OracleDifference
from data_pipeline.engine import Engine, statistics_of
from data_pipeline.run import run_pipeline
from megatron_joy.cli.main import main
from megatron_joy.data.ledger import load_ledger
from megatron_joy.data.manifest import load_manifest
from megatron_joy.data.provenance import read_origins
from megatron_joy.data.shards import ShardReader
from megatron_joy.data.verify import verify
from megatron_joy.errors import UserError
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
    """Two files with copies inside and across them, and records that are none."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", [*texts(200), "one two three four", *texts(30)])
    write_jsonl(folder / "b.jsonl", texts(150, seed=1))
    with open(folder / "b.jsonl", "ab") as stream:
        stream.write(b'{"text": "caf\xe9"}\n{"text"\n')
    return folder


@pytest.fixture(scope="module")
def shuffled(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shuffled run of the corpus, which also makes the tokenizer."""
    out = tmp_path_factory.mktemp("shuffled")
    run_inline(write_pipeline(corpus, out))
    return out


def stream_pipeline(corpus: Path, shuffled: Path, out: Path, extra: str = "", **output: object) -> Path:
    tokenizer = f'folder = "{shuffled / "tokenizer"}"'
    return write_pipeline(corpus, out, extra, tokenizer, **{"shuffle": False, **output}).rename(
        out.parent / f"{out.name}.toml"
    )


@pytest.fixture(scope="module")
def streamed(corpus: Path, shuffled: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An undisturbed run in this process."""
    return run_inline(stream_pipeline(corpus, shuffled, tmp_path_factory.mktemp("streamed") / "out"))


def inputs_of(corpus: Path) -> list[str]:
    """All documents in the order of the inputs."""
    found = []
    for name in ("a", "b"):
        for line in (corpus / f"{name}.jsonl").read_bytes().splitlines():
            try:
                found.append(json.loads(line)["text"])
            except ValueError:  # not UTF-8, or no JSON
                continue
    return found


def test_documents_stay_in_order_and_each_is_on_the_side_where_the_shuffled_run_has_it(
    corpus: Path, shuffled: Path, streamed: Engine
) -> None:
    out = streamed.job.folder
    validation = set(documents_of(shuffled / "validation"))
    documents = inputs_of(corpus)
    assert documents_of(out / "train") == [text for text in documents if text not in validation]
    assert documents_of(out / "validation") == [text for text in documents if text in validation]
    assert len(documents) > len(set(documents))  # copies stay


def test_tokens_are_the_librarys_and_megatron_core_reads_them(corpus: Path, shuffled: Path, streamed: Engine) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    out = streamed.job.folder
    library = Tokenizer.from_file(str(shuffled / "tokenizer" / "tokenizer.json"))
    library.encode_special_tokens = True
    manifest = load_manifest(out / "train")
    assert len(manifest.shards) > 3
    documents = iter(documents_of(out / "train"))
    for entry in manifest.shards:
        ours, theirs = ShardReader(out / "train" / entry.name), IndexedDataset(str(out / "train" / entry.name))
        assert len(ours) == len(theirs) == entry.documents
        for number in range(len(ours)):
            ids = [*library.encode(next(documents), add_special_tokens=False).ids, manifest.tokenizer.eod_id]
            assert ours.document(number).tolist() == theirs[number].tolist() == ids


def test_shards_verify_lead_to_their_bytes_and_the_accounts_close(
    corpus: Path, streamed: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    out = streamed.job.folder
    count = len(inputs_of(corpus))
    for split in ("train", "validation"):
        assert verify(out / split).problems == []
        manifest = load_manifest(out / split)
        assert manifest.accounts.documents_in == count + 2
        assert manifest.accounts.difference == 0
        assert {"not_utf8": 1, "broken_json": 1}.items() <= manifest.accounts.dropped.items()
        assert "exact_duplicate" not in manifest.accounts.dropped
        documents = iter(documents_of(out / split))
        for entry in manifest.shards:
            assert entry.provenance is not None
            for origin in read_origins(out / split / entry.provenance):
                with open(origin.file, "rb") as stream:
                    stream.seek(origin.offset)
                    assert json.loads(stream.readline())["text"] == next(documents)
    assert [step.name for step in load_ledger(out).steps] == ["read"]
    assert sum(load_manifest(out / split).totals.documents for split in ("train", "validation")) == count
    assert main(["data", "stats", str(out)]) == 0
    assert "deduplicate" not in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_are_the_same_for_any_number_of_workers(
    corpus: Path, shuffled: Path, streamed: Engine, tmp_path: Path, workers: int
) -> None:
    outcome = run_pipeline(str(stream_pipeline(corpus, shuffled, tmp_path / "out")), workers=workers)
    assert digests(tmp_path / "out") == digests(streamed.job.folder)
    assert (outcome.tasks_kept, outcome.checked > 0) == (0, True)
    assert not (tmp_path / "out" / "work" / "stream").exists()


def run_and_die(pipeline: str, shards: int) -> None:
    """Run in this process, which SIGKILL ends when so many shards are written and the next one is about to appear."""
    written, close = count(), write.OpenShard.close

    def last(shard: write.OpenShard) -> write.Written:
        if next(written) == shards:
            os.kill(os.getpid(), signal.SIGKILL)
        return close(shard)

    write.OpenShard.close = last  # type: ignore[method-assign]
    run_inline(Path(pipeline))


def test_a_killed_run_goes_on_to_the_same_bytes(corpus: Path, shuffled: Path, streamed: Engine, tmp_path: Path) -> None:
    pipeline, out = stream_pipeline(corpus, shuffled, tmp_path / "out"), tmp_path / "out"
    program = "import sys; from tests.data_pipeline.test_stream import run_and_die; run_and_die(sys.argv[1], 5)"
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", program, str(pipeline)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(out.rglob(".*partial*"))
    assert not (out / "train" / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in out.glob("work/tasks/*/*.json")}
    assert len(done) >= 3
    run_pipeline(str(pipeline), workers=1)
    assert digests(out) == digests(streamed.job.folder)
    assert all(path.stat().st_mtime_ns == changed for path, changed in done.items())
    assert not list(out.rglob(".*partial*"))


def test_transforms_are_in_the_path_and_their_losses_in_the_ledger(
    corpus: Path, shuffled: Path, tmp_path: Path
) -> None:
    engine = run_inline(stream_pipeline(corpus, shuffled, tmp_path / "out", '[[transforms]]\nkind = "length"\n'))
    ledger = load_ledger(engine.job.folder)
    assert [step.name for step in ledger.steps] == ["read", "length"]
    assert ledger.steps[1].documents_out == sum(totals.documents for totals in ledger.splits.values())
    assert ledger.steps[1].documents_out < ledger.steps[1].documents_in


def test_a_difference_from_the_oracle_makes_the_library_encode_the_task(
    corpus: Path, shuffled: Path, streamed: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = write.Encoder.encode

    def differ(encoder: write.Encoder, batch: list[bytes]) -> object:
        if encoder.engine == "gigatoken":
            raise OracleDifference("gigatoken and the Hugging Face library differ on b'x'")
        return encode(encoder, batch)

    monkeypatch.setattr(write.Encoder, "encode", differ)
    engine = run_inline(stream_pipeline(corpus, shuffled, tmp_path / "out"))
    assert digests(tmp_path / "out") == digests(streamed.job.folder)
    (notes,) = [statistics_of(engine.job, "finish", 1)[0]["notes"]]
    assert "shard_00000 was encoded by the Hugging Face library" in notes[0]


def test_the_same_folder_shuffled_and_not_and_shuffled_again_is_never_a_mixture(shuffled: Path, tmp_path: Path) -> None:
    # One shard of each split, of the same documents in both orders: sizes tell nothing apart.
    corpus = write_jsonl(tmp_path / "corpus" / "a.jsonl", texts(100)).parent
    pipeline = stream_pipeline(corpus, shuffled, tmp_path / "out", shard_megabytes=10)
    with_shuffle = ("output.shuffle=true",)
    run_inline(pipeline, *with_shuffle)
    first = digests(tmp_path / "out")
    run_inline(pipeline)
    unshuffled = digests(tmp_path / "out")
    assert unshuffled != first
    run_inline(pipeline, *with_shuffle)
    assert digests(tmp_path / "out") == first
    run_inline(pipeline)
    assert digests(tmp_path / "out") == unshuffled


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("near_duplicates.enabled=true", "near_duplicates.enabled: has no effect with output.shuffle = false"),
        ("seed=3", "seed: has no effect with output.shuffle = false"),
        ("output.keep_work=true", "output.keep_work: has no effect with output.shuffle = false"),
        ('score=[{name="a",scorer="heuristic"}]', "score: has no effect with output.shuffle = false"),
        ("decontaminate={enabled=true,evaluation='x'}", "decontaminate.enabled: has no effect with output.shuffle"),
    ],
)
def test_what_needs_documents_to_meet_is_refused(
    corpus: Path, shuffled: Path, tmp_path: Path, override: str, says: str
) -> None:
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        load_pipeline(str(stream_pipeline(corpus, shuffled, tmp_path / "out")), (override,))


def test_training_a_tokenizer_is_refused(corpus: Path, tmp_path: Path) -> None:
    pipeline = write_pipeline(corpus, tmp_path, shuffle=False)
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size: training one needs a random sample"):
        load_pipeline(str(pipeline))


def test_an_empty_corpus_and_an_empty_split_are_refused_and_nothing_is_published(
    shuffled: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "empty" / "a.jsonl", [" ", " "])
    with pytest.raises(UserError, match=r"empty corpus, no record is a document \(empty 2\)"):
        run_inline(stream_pipeline(tmp_path / "empty", shuffled, tmp_path / "none"))
    write_jsonl(tmp_path / "small" / "a.jsonl", ["only one text"])
    with pytest.raises(UserError, match=r"output\.validation_share = 1e-06: leaves validation empty"):
        run_inline(stream_pipeline(tmp_path / "small", shuffled, tmp_path / "one", validation_share=1e-6))
    assert not list(tmp_path.rglob("manifest.json"))


def test_many_shards_need_no_groups(
    corpus: Path, shuffled: Path, streamed: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import spool

    monkeypatch.setattr(spool, "MOST_AT_ONCE", 3)
    engine = run_inline(stream_pipeline(corpus, shuffled, tmp_path / "out"))
    assert engine.job.plan.buckets.in_group > 1
    assert digests(tmp_path / "out") == digests(streamed.job.folder)


def test_memory_is_a_batch_and_not_a_shard(
    corpus: Path, shuffled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import stream

    largest = 0
    add = write.OpenShard.add

    def watched(shard: write.OpenShard, batch: list[bytes]) -> None:
        nonlocal largest
        largest = max(largest, sum(map(len, batch)))
        add(shard, batch)

    monkeypatch.setattr(write.OpenShard, "add", watched)
    monkeypatch.setattr(stream, "BATCH_BYTES", 3000)
    engine = plan_inline(stream_pipeline(corpus, shuffled, tmp_path / "out", shard_megabytes=10))
    engine.run_task("tokenizer", 0)
    engine.run_task("stream", 0)
    longest = max(len(text.encode()) for text in inputs_of(corpus))
    assert 3000 <= largest < 3000 + longest
    assert np.sum([half["documents_in"] for half in statistics_of(engine.job, "stream", 1)[0]["writes"]]) > 300
