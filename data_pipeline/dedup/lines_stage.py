"""Repeated lines as stages of a pipeline: `spans` (a task for each bucket), `repeats` (one for each share of hashes).

They come after all that drops documents: the lines of a document that goes are not what another one repeats. `spans`
hashes the lines of a bucket's documents in their order. `repeats` sorts one share of all buckets' hashes and notes
where a span stands that an earlier place has too, bucket by bucket. `cut` takes those lines out when the shard is
written.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.dedup.external import Rows, RowSorter, group_starts, read_rows, rows_of
from data_pipeline.dedup.lines import LINE_BITS, Positions, SpanSettings, repeated_positions, span_rows, without_spans
from data_pipeline.engine import Job, TaskResult
from data_pipeline.score.base import Scores
from data_pipeline.score.stage import bound_settings
from data_pipeline.select import Losses, select
from data_pipeline.spool import Spooled, text_hash, write_index
from megatron_joy.data.atomic import atomic_file

NAME = "repeated_lines"  # of the step, and why a document goes that has no other lines
SPANS, PLACES, BUCKETS = "spans.bin", "places.bin", "buckets.npy"
SHARES = 256  # of the hashes at most, each a task
DOCUMENT_BITS = 22  # a place is a bucket's number, a document's there and a span's
MOST_DOCUMENTS = 1 << DOCUMENT_BITS  # of a bucket; those behind them are not looked at
BUCKET_SHIFT = np.uint64(DOCUMENT_BITS + LINE_BITS)


def _settings(job: Job) -> SpanSettings:
    section = job.pipeline.repeated_lines
    return SpanSettings(section.lines, section.least_bytes)


def lines_settings(job: Job) -> Any:
    """What of a pipeline its repeated lines depend on: also what chooses and orders its documents."""
    section = job.pipeline.repeated_lines
    return [section.model_dump(), job.pipeline.seed, bound_settings(job)] if section.enabled else None


def spans_tasks(job: Job) -> int:
    """A task for each bucket."""
    return job.plan.buckets.total if job.pipeline.repeated_lines.enabled else 0


def repeats_tasks(job: Job) -> int:
    """A task for each share of the hashes."""
    return min(SHARES, spans_tasks(job))


def spans_task(job: Job, bucket: int) -> TaskResult:
    """Write (hash, place in the bucket) of the spans of what stays of a bucket, by hash."""
    documents, _, _ = select(job, bucket)
    folder = job.task_folder("spans", bucket)
    by_hash = RowSorter(folder / "scratch")
    for number, document in enumerate(documents[:MOST_DOCUMENTS]):
        by_hash.add(span_rows(number, document.text, _settings(job)))
    spans = 0
    with atomic_file(folder / SPANS) as stream:
        for block in by_hash.blocks():
            stream.write(np.ascontiguousarray(block).data)
            spans += len(block)
    return TaskResult([job.describe_scratch(folder / SPANS)], {"spans": spans})


def _share_of(rows: Rows, share: int, shares: int) -> Rows:
    """The rows [n, 2], sorted by hash, whose hashes are in one share."""
    # Not searchsorted: it would copy the whole column of a mapped file.
    low, high = (
        bisect_left(range(len(rows)), (part << 64) // shares, key=lambda row: int(rows[row, 0]))
        for part in (share, share + 1)
    )
    return np.array(rows[low:high])


def repeats_task(job: Job, share: int) -> TaskResult:
    """Note the repeated spans of one share of the hashes: their places by bucket, and where each bucket's begin."""
    folder, buckets = job.task_folder("repeats", share), job.plan.buckets.total
    by_hash, by_place = RowSorter(folder / "hashes"), RowSorter(folder / "places")
    for bucket in range(buckets):
        rows = _share_of(read_rows(job.task_folder("spans", bucket) / SPANS), share, repeats_tasks(job))
        rows[:, 1] |= np.uint64(bucket) << BUCKET_SHIFT
        by_hash.add(rows)
    for places in repeated_positions(by_hash):
        by_place.add(rows_of(places, np.zeros(len(places), dtype=np.uint64)))
    counts = np.zeros(buckets + 1, dtype=np.int64)
    with atomic_file(folder / PLACES) as stream:
        for block in by_place.blocks():
            stream.write(np.ascontiguousarray(block[:, 0]).data)
            counts[1:] += np.bincount((block[:, 0] >> BUCKET_SHIFT).astype(np.int64), minlength=buckets)
    write_index(folder / BUCKETS, np.cumsum(counts))
    files = [job.describe_scratch(folder / name) for name in (PLACES, BUCKETS)]
    return TaskResult(files, {"repeats": int(counts.sum())})


def _places(folder: Path, bucket: int) -> Positions:
    begin, end = np.load(folder / BUCKETS, mmap_mode="r", allow_pickle=False)[bucket : bucket + 2].tolist()
    return np.fromfile(folder / PLACES, dtype=np.uint64, count=end - begin, offset=8 * begin)


def _repeats(job: Job, bucket: int) -> Iterator[tuple[int, Positions]]:
    """Each document of a bucket that has repeated spans, by its number, and these spans, ascending."""
    shares = [_places(job.task_folder("repeats", share), bucket) for share in range(repeats_tasks(job))]
    places = np.sort(np.concatenate([np.zeros(0, np.uint64), *shares]))
    numbers = (places >> np.uint64(LINE_BITS)) & np.uint64(MOST_DOCUMENTS - 1)
    starts = group_starts(numbers)
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        yield int(numbers[start]), places[start:stop] & np.uint64((1 << LINE_BITS) - 1)


def cut(
    job: Job, bucket: int, documents: Sequence[Spooled], scores: Scores | None, losses: Losses
) -> tuple[list[Spooled], Scores | None, dict[str, Counter[str]]]:
    """A bucket's documents without the lines that an earlier place has too; what is nothing else goes into `losses`.

    Returns the documents that stay, their scores, and by source how many documents changed, lines and bytes went.
    """
    kept, changed = list[Spooled | None](documents), dict[str, Counter[str]]()
    for number, spans in _repeats(job, bucket):
        document = documents[number]
        text, lines = without_spans(document.text, spans.astype(np.int64), _settings(job))
        if not text.strip():
            losses.add(NAME, document)
            kept[number] = None
            continue
        kept[number] = replace(document, view=text, hash=text_hash(text))
        source = job.pipeline.sources[job.plan.inputs[document.input].source].name
        gone = {"documents": 1, "lines": lines, "bytes": document.size - len(text)}
        changed.setdefault(source, Counter()).update(gone)
    rows = [number for number, document in enumerate(kept) if document is not None]
    return [document for document in kept if document is not None], None if scores is None else scores[rows], changed
