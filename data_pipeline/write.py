"""One bucket becomes one shard: duplicates dropped, shuffled, repeated lines cut, encoded, written with origins."""

import io
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from data_pipeline.config import EncodeSection
from data_pipeline.dedup.lines_stage import cut
from data_pipeline.encode import Encoder, OracleDifference, Text
from data_pipeline.engine import Job, TaskResult, statistics_of
from data_pipeline.native.library import kernels
from data_pipeline.score.base import Scores
from data_pipeline.select import select
from data_pipeline.spool import SPLITS, Spooled
from data_pipeline.tokenizer import TOKENIZER_FILE
from megatron_joy.data.atomic import atomic_file, write_atomically
from megatron_joy.data.checksum import file_sha256
from megatron_joy.data.manifest import MANIFEST_NAME, SCORES_SUFFIX, TOKENIZER_FOLDER, ShardEntry, TokenizerIdentity
from megatron_joy.data.provenance import SUFFIX, DocumentOrigin, write_origins
from megatron_joy.data.shards import ShardSummary, ShardWriter, bin_path, idx_path, token_dtype
from megatron_joy.errors import WorkError

UNKNOWN = "unknown"  # language of documents that no transform identified
BATCH_BYTES = 1_000_000  # text that is encoded and written at a time: its tokens stay in the processor's cache


@dataclass(frozen=True)
class Written:
    """A shard's files and counts. by_id: int64 [vocabulary], by_document: int64 [documents], both of tokens."""

    summary: ShardSummary
    by_id: npt.NDArray[np.int64]
    by_document: npt.NDArray[np.int64]
    engine: str
    checked: int
    note: str | None


class OpenShard:
    """A shard that texts are encoded into, batch after batch; nothing of it is visible before `close`.

    A context manager, which leaves nothing behind when its block fails.
    """

    def __init__(self, prefix: Path, encoder: Encoder, vocab_size: int) -> None:
        self._encoder = encoder
        self._writer = ShardWriter(prefix, token_dtype(vocab_size))
        self._by_id = np.zeros(vocab_size, dtype=np.int64)
        self._by_document = [np.zeros(0, dtype=np.int64)]
        self._checked = 0

    def add(self, texts: Sequence[Text]) -> None:
        """Encode and write texts, about `BATCH_BYTES` of them. Raises OracleDifference."""
        before = self._encoder.checked
        tokens, lengths = self._encoder.encode(texts)
        self._checked += self._encoder.checked - before
        self._writer.add(tokens, lengths)
        kernels().joy_count(tokens, len(tokens), self._by_id, len(self._by_id))
        self._by_document.append(lengths)

    def close(self) -> Written:
        """Let the shard appear; returns what was written."""
        summary, encoder = self._writer.close(), self._encoder
        by_document = np.concatenate(self._by_document)
        return Written(summary, self._by_id, by_document, encoder.engine, self._checked, encoder.note)

    def __enter__(self) -> "OpenShard":
        return self

    def __exit__(self, *failure: object) -> None:
        self._writer.abandon()


def _batches(texts: Sequence[Text]) -> Iterator[Sequence[Text]]:
    """The texts, about `BATCH_BYTES` of them at a time."""
    first, size = 0, 0
    for number, text in enumerate(texts, 1):
        size += len(text)
        if size >= BATCH_BYTES or number == len(texts):
            yield texts[first:number]
            first, size = number, 0


def write_tokens(prefix: Path, encoder: Encoder, texts: Sequence[Text], vocab_size: int) -> Written:
    """Encode texts into the shard `prefix`. Raises OracleDifference and then leaves nothing behind."""
    with OpenShard(prefix, encoder, vocab_size) as shard:
        for batch in _batches(texts):
            shard.add(batch)
        return shard.close()


@lru_cache(maxsize=1)
def _encoder(folder: Path, identity: TokenizerIdentity, settings: EncodeSection) -> Encoder:
    """Loading a tokenizer of 128,000 entries takes as long as encoding a hundred megabytes: once for each worker.

    Raises WorkError when the output folder's tokenizer is not the one that its stage made.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file() or file_sha256(path) != identity.sha256:
        raise WorkError(f"{path}: not the tokenizer that this run prepared; remove it and run again")
    return Encoder(folder, identity, settings)


def tokenizer_of(job: Job) -> TokenizerIdentity:
    """The tokenizer that the job's own stage made."""
    return TokenizerIdentity(**statistics_of(job, "tokenizer", 1)[0])


def encoded_checked[Result](job: Job, name: str, write: Callable[[Encoder], Result]) -> Result:
    """What `write` does with the job's encoder; where gigatoken and the oracle differ, again with the oracle alone.

    name: of what is written, for the note.
    """
    identity = tokenizer_of(job)
    folder, settings = job.folder / TOKENIZER_FOLDER, job.pipeline.encode
    encoder = _encoder(folder, identity, settings)
    encoder.restart()
    try:
        return write(encoder)
    except OracleDifference as difference:
        slow = Encoder(folder, identity, settings.model_copy(update={"engine": "huggingface"}))
        slow.note = f"{difference}; {name} was encoded by the Hugging Face library"
        return write(slow)


def origins_of(job: Job, documents: list[Spooled]) -> list[DocumentOrigin]:
    """Where each document is from, in their order."""
    names = [source.name for source in job.pipeline.sources]
    files = [(names[file.source], file.path) for file in job.plan.inputs]
    return [
        DocumentOrigin(
            *files[document.input],
            document.offset,
            document.licence,
            document.hash.hex(),
            len(document.view),
            document.url,
            document.language,
            document.part,
        )
        for document in documents
    ]


def shard_prefix(job: Job, split: str, number: int) -> Path:
    """The path of a shard without its endings."""
    return job.folder / split / f"shard_{number:05d}"


def count_by(names: Iterable[str], origins: list[DocumentOrigin], tokens: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Documents, tokens and bytes of each name; `names`: one for each document."""
    totals: dict[str, dict[str, int]] = {}
    for name, origin, number in zip(names, origins, tokens.tolist(), strict=True):
        own = totals.setdefault(name, {"documents": 0, "tokens": 0, "bytes_text": 0})
        own["documents"] += 1
        own["tokens"] += number
        own["bytes_text"] += origin.bytes_text
    return totals


def count_lengths(tokens: npt.NDArray[np.int64]) -> list[int]:
    """How many documents have 1, 2 to 3, 4 to 7, ... tokens; tokens: int64 [documents]."""
    return np.bincount(np.log2(tokens).astype(np.int64)).tolist()


def _write_scores(prefix: Path, scores: Scores | None) -> dict[str, Any]:
    """Write a shard's scores, float32 [documents, columns], and what the manifest says of them."""
    if scores is None:
        return {}
    path = prefix.with_name(prefix.name + SCORES_SUFFIX)
    content = io.BytesIO()
    np.save(content, scores, allow_pickle=False)
    write_atomically(path, content.getvalue())
    return {"scores": path.name, "scores_blake3": blake3(content.getvalue()).hexdigest()}


def unpublish(job: Job, stage: str) -> None:
    """Take an earlier run's manifests away before the first of their shards changes: a mixture must not look whole.

    Until then they stay: a run that stops early, at a mistake in its inputs, leaves what was published usable. The
    records of the other stage that writes shards of these names go too, which are no longer true.
    """
    for name in SPLITS:
        (job.folder / name / MANIFEST_NAME).unlink(missing_ok=True)
    for other in {"write", "stream"} - {stage}:
        shutil.rmtree(job.record_path(other, 0).parent, ignore_errors=True)


def shard_result(
    job: Job, prefix: Path, written: Written, origins: list[DocumentOrigin], folder: Path, scores: Scores | None = None
) -> TaskResult:
    """What is told of a shard whose tokens are written; writes its origins and scores, and its counts into `folder`."""
    provenance = prefix.with_name(prefix.name + SUFFIX)
    entry = ShardEntry(
        name=prefix.name,
        provenance=provenance.name,
        provenance_blake3=write_origins(provenance, origins),
        **_write_scores(prefix, scores),
        **vars(written.summary),
    )
    counts = folder / f"counts_{prefix.parent.name}.npy"
    with atomic_file(counts) as stream:
        np.save(stream, written.by_id, allow_pickle=False)
    files = [
        job.describe(bin_path(prefix), entry.bin_blake3),
        job.describe(idx_path(prefix), entry.idx_blake3),
        job.describe(provenance, entry.provenance_blake3),
        job.describe(counts),
    ]
    statistics = {
        "sources": count_by((origin.source for origin in origins), origins, written.by_document),
        "languages": count_by((origin.language or UNKNOWN for origin in origins), origins, written.by_document),
        "lengths": count_lengths(written.by_document),
        "shard": entry.model_dump(),
        "counts": files[-1].path,
        "engine": written.engine,
        "checked": written.checked,
        "note": written.note,
    }
    if entry.scores is not None:
        files.append(job.describe(prefix.with_name(entry.scores), entry.scores_blake3))
    return TaskResult(files, statistics)


def write_tasks(job: Job) -> int:
    """A task for each bucket, unless documents go straight into shards (stream.py)."""
    return job.plan.buckets.total if job.pipeline.output.shuffle else 0


def write_task(job: Job, shard: int) -> TaskResult:
    """The task of the write stage; an empty bucket gives no shard."""
    split, number = job.plan.buckets.split_of(shard)
    entries = tokenizer_of(job).vocab_size
    documents, scores, losses = select(job, shard)
    changed: dict[str, Counter[str]] = {}
    if job.pipeline.repeated_lines.enabled:
        documents, scores, changed = cut(job, shard, documents, scores, losses)
    statistics: dict[str, Any] = {
        "split": split,
        "documents_in": len(documents) + sum(counts.total() for counts in losses.documents.values()),
        **losses.as_statistics(),
        "repeated_lines": changed,
        "sources": {},
        "languages": {},
        "shard": None,
    }
    unpublish(job, "write")
    if not documents:
        return TaskResult([], statistics)
    prefix = shard_prefix(job, split, number)
    texts = [document.view for document in documents]
    written = encoded_checked(job, prefix.name, lambda encoder: write_tokens(prefix, encoder, texts, entries))
    result = shard_result(job, prefix, written, origins_of(job, documents), job.task_folder("write", shard), scores)
    return TaskResult(result.files, statistics | result.statistics)
