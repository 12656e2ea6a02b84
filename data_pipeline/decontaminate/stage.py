"""Decontamination as stages of a pipeline: `overlap` (one task for each read task), `contamination` (one task).

`overlap` notes which evaluation n-grams each document holds; few hold any. `contamination` counts the common ones over
different texts (copies and near-duplicates that go count once), judges, and writes for each bucket the hashes of the
texts that go, and `decontaminated.jsonl`: what was removed from where for which item.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data_pipeline.decontaminate.contamination import count_unrelated, judge, whitelist_of
from data_pipeline.decontaminate.evaluation import EvaluationIndex, index_items, item_files, read_items
from data_pipeline.dedup.stage import near_duplicates_of
from data_pipeline.engine import Job, TaskResult
from data_pipeline.spool import HASH_BYTES, read_all
from megatron_joy.data.atomic import atomic_file, write_atomically

HITS = "hits.jsonl"
REPORT = "decontaminated.jsonl"


@lru_cache(maxsize=1)
def _index(folder: str, fields: tuple[str, ...]) -> EvaluationIndex:
    return index_items(read_items(Path(folder), fields))


def index_of(job: Job) -> EvaluationIndex:
    """The pipeline's evaluation sets, made once for each worker. Raises UserError for a folder without items."""
    section = job.pipeline.decontaminate
    assert section.evaluation is not None, "the schema asks for it"
    return _index(section.evaluation, tuple(section.fields))


def overlap_task(job: Job, shard: int) -> TaskResult:
    """Note the evaluation n-grams of one read task's documents."""
    index = index_of(job)
    path = job.task_folder("overlap", shard) / HITS
    found = 0
    with atomic_file(path) as stream:
        for document in read_all(job.task_folder("read", shard)):
            grams = index.grams_in(document.text)
            if len(grams):
                found += 1
                row = [document.hash.hex(), document.input, document.offset, grams.tolist()]
                stream.write(orjson.dumps(row) + b"\n")
    return TaskResult([job.describe(path)], {"documents_with_grams": found})


def _hits(job: Job) -> Iterator[tuple[bytes, int, int, list[int]]]:
    """(text hash, input, offset, n-grams) of every document that holds some."""
    for shard in range(len(job.plan.tasks)):
        with open(job.task_folder("overlap", shard) / HITS, "rb") as stream:
            for line in stream:
                text, file, offset, grams = orjson.loads(line)
                yield bytes.fromhex(text), file, offset, grams


def _near_duplicates_among_hits(job: Job) -> set[bytes]:
    """Hashes of texts that hold n-grams and go as near-duplicates of others; a bucket's list at a time is in memory."""
    by_bucket: dict[int, set[bytes]] = {}
    for digest, *_ in _hits(job):
        by_bucket.setdefault(job.plan.buckets.bucket_of(digest), set()).add(digest)
    return set().union(*(hashes & near_duplicates_of(job, bucket) for bucket, hashes in by_bucket.items()))


def _different(job: Job, gone: set[bytes]) -> Iterator[tuple[bytes, int, int, list[int]]]:
    """The hits of each different text that stays so far."""
    seen = set(gone)
    for hit in _hits(job):
        if hit[0] not in seen:
            seen.add(hit[0])
            yield hit


def contamination_task(job: Job, shard: int) -> TaskResult:
    """Make the whitelist, judge, list what goes for each bucket, and report it."""
    section, index = job.pipeline.decontaminate, index_of(job)
    gone = _near_duplicates_among_hits(job)
    counts = count_unrelated(index, (np.array(grams) for *_, grams in _different(job, gone)))
    whitelist = whitelist_of(counts, section.common)
    buckets: dict[int, list[bytes]] = {bucket: [] for bucket in range(job.plan.buckets.total)}
    removed: dict[str, Counter[str]] = {}  # by source and benchmark
    report = job.folder / REPORT
    with atomic_file(report) as stream:
        for digest, file, offset, grams in _different(job, gone):
            finding = judge(index, whitelist, np.array(grams), section.least)
            if finding is None:
                continue
            buckets[job.plan.buckets.bucket_of(digest)].append(digest)
            origin = job.plan.inputs[file]
            source = job.pipeline.sources[origin.source].name
            removed.setdefault(source, Counter())[finding.benchmark] += 1
            place = {"file": origin.path, "offset": offset, "blake3": digest.hex()}
            stream.write(orjson.dumps({"source": source, **place, **vars(finding)}))
            stream.write(b"\n")
    files = [job.describe(report)]
    for bucket, hashes in buckets.items():
        path = removed_path(job, bucket)
        write_atomically(path, b"".join(hashes))
        files.append(job.describe(path))
    short = sum(not item.grams for item in index.items)
    statistics = {"items": len(index.items), "items_too_short": short, "whitelisted": int(whitelist.sum())}
    by_source = {source: dict(sorted(counts.items())) for source, counts in sorted(removed.items())}
    return TaskResult(files, {**statistics, "removed": by_source})


def removed_path(job: Job, bucket: int) -> Path:
    """The hashes of a bucket's texts that go, one after another."""
    return job.task_folder("contamination", 0) / f"removed_{bucket:05d}.bin"


def contaminated_of(job: Job, bucket: int) -> set[bytes]:
    """Hashes of the texts of a bucket that hold an evaluation item; none when the pipeline does not ask."""
    if not job.pipeline.decontaminate.enabled:
        return set()
    content = removed_path(job, bucket).read_bytes()
    return {content[place : place + HASH_BYTES] for place in range(0, len(content), HASH_BYTES)}


def contamination_settings(job: Job) -> Any:
    """What of a pipeline the removals depend on, the evaluation files too; None when it does not ask for them."""
    section = job.pipeline.decontaminate
    if not section.enabled or section.evaluation is None:
        return None
    paths = item_files(Path(section.evaluation))
    files = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]
    return [section.fields, section.common, section.least, files]
