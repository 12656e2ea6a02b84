"""One bucket becomes one shard: duplicates dropped, order shuffled, encoded, written with its documents' origins."""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from data_pipeline.config import EncodeSection
from data_pipeline.encode import Encoder, Ids, OracleDifference
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

Text = bytes | memoryview  # UTF-8
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


def encode_in_batches(encoder: Encoder, texts: Sequence[Text]) -> Iterator[tuple[Ids, npt.NDArray[np.int64]]]:
    """The texts' tokens and lengths, about `BATCH_BYTES` of text at a time; tokens last until the next batch."""
    first, size = 0, 0
    for number, text in enumerate(texts, 1):
        size += len(text)
        if size >= BATCH_BYTES or number == len(texts):
            yield encoder.encode([bytes(text) for text in texts[first:number]])
            first, size = number, 0


def write_tokens(prefix: Path, encoder: Encoder, texts: Sequence[Text], vocab_size: int) -> Written:
    """Encode texts into the shard `prefix`. Raises OracleDifference and then leaves nothing behind."""
    by_id = np.zeros(vocab_size, dtype=np.int64)
    by_document = [np.zeros(0, dtype=np.int64)]
    with ShardWriter(prefix, token_dtype(vocab_size)) as writer:
        for tokens, lengths in encode_in_batches(encoder, texts):
            writer.add(tokens, lengths)
            kernels().joy_count(tokens, len(tokens), by_id, vocab_size)
            by_document.append(lengths)
        summary = writer.close()
    return Written(summary, by_id, np.concatenate(by_document), encoder.engine, encoder.checked, encoder.note)


@lru_cache(maxsize=1)
def _encoder(folder: Path, identity: TokenizerIdentity, settings: EncodeSection) -> Encoder:
    """Loading a tokenizer of 128,000 entries takes as long as encoding a hundred megabytes: once for each worker.

    Raises WorkError when the output folder's tokenizer is not the one that its stage made.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file() or file_sha256(path) != identity.sha256:
        raise WorkError(f"{path}: not the tokenizer that this run prepared; remove it and run again")
    return Encoder(folder, identity, settings)


def _write_checked(job: Job, prefix: Path, texts: Sequence[Text], identity: TokenizerIdentity) -> Written:
    """As write_tokens; where gigatoken and the oracle differ, the whole shard is the oracle's."""
    folder, settings = job.folder / TOKENIZER_FOLDER, job.pipeline.encode
    encoder = _encoder(folder, identity, settings)
    encoder.restart()
    try:
        return write_tokens(prefix, encoder, texts, identity.vocab_size)
    except OracleDifference as difference:
        slow = Encoder(folder, identity, settings.model_copy(update={"engine": "huggingface"}))
        slow.note = f"{difference}; {prefix.name} was encoded by the Hugging Face library"
        return write_tokens(prefix, slow, texts, identity.vocab_size)


def origins_of(job: Job, documents: list[Spooled]) -> list[DocumentOrigin]:
    """Where each document is from, in their order."""
    names = [source.name for source in job.pipeline.sources]
    found = []
    for document in documents:
        file = job.plan.inputs[document.input]
        place = (names[file.source], file.path, document.offset, document.licence, document.hash.hex(), document.size)
        found.append(DocumentOrigin(*place, document.url, document.language, document.part))
    return found


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


def _unpublish(job: Job) -> None:
    """Take an earlier run's manifests away before the first of their shards changes: a mixture must not look whole.

    Until then they stay: a run that stops early, at a mistake in its inputs, leaves what was published usable.
    """
    for name in SPLITS:
        (job.folder / name / MANIFEST_NAME).unlink(missing_ok=True)


def write_task(job: Job, shard: int) -> TaskResult:
    """The task of the write stage; an empty bucket gives no shard."""
    split, number = job.plan.buckets.split_of(shard)
    identity = TokenizerIdentity(**statistics_of(job, "tokenizer", 1)[0])
    documents, scores, losses = select(job, shard)
    statistics: dict[str, Any] = {
        "split": split,
        "documents_in": len(documents) + sum(counts.total() for counts in losses.documents.values()),
        **losses.as_statistics(),
        "sources": {},
        "languages": {},
        "shard": None,
    }
    _unpublish(job)
    if not documents:
        return TaskResult([], statistics)
    prefix = job.folder / split / f"shard_{number:05d}"
    written = _write_checked(job, prefix, [document.view for document in documents], identity)
    origins = origins_of(job, documents)
    provenance = prefix.with_name(prefix.name + SUFFIX)
    entry = ShardEntry(
        name=prefix.name,
        provenance=provenance.name,
        provenance_blake3=write_origins(provenance, origins),
        **_write_scores(prefix, scores),
        **vars(written.summary),
    )
    counts = job.task_folder("write", shard) / "counts.npy"
    with atomic_file(counts) as stream:
        np.save(stream, written.by_id, allow_pickle=False)
    statistics |= {
        "sources": count_by((origin.source for origin in origins), origins, written.by_document),
        "languages": count_by((origin.language or UNKNOWN for origin in origins), origins, written.by_document),
        "lengths": count_lengths(written.by_document),
        "shard": entry.model_dump(),
    }
    statistics |= {"engine": written.engine, "checked": written.checked, "note": written.note}
    files = [
        job.describe(bin_path(prefix), entry.bin_blake3),
        job.describe(idx_path(prefix), entry.idx_blake3),
        job.describe(provenance, entry.provenance_blake3),
        job.describe(counts),
    ]
    if entry.scores is not None:
        files.append(job.describe(prefix.with_name(entry.scores), entry.scores_blake3))
    return TaskResult(files, statistics)
