"""Which documents of a bucket stay: copies, near-duplicates and contaminated ones go, then what misses a score's bound.

Every reason is counted in documents and in bytes of text, by source, with a few of the texts themselves; a document is
counted under the first reason that applies.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.decontaminate.stage import contaminated_of
from data_pipeline.dedup.stage import near_duplicates_of
from data_pipeline.engine import Job
from data_pipeline.score.base import Scores, reasons
from data_pipeline.score.scorers import bounds_of, column_names
from data_pipeline.spool import Spooled, read_bucket, shuffled, unique
from data_pipeline.transform.chain import Sampler
from megatron_joy.errors import WorkError

EXACT, NEAR, CONTAMINATED = "exact_duplicate", "near_duplicate", "contaminated"
SCORES = "scores.npy"


class Losses:
    """What a bucket loses, by reason. documents, bytes: by input file."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._sampler = Sampler()
        self.documents: dict[str, Counter[int]] = {}
        self.bytes: dict[str, Counter[int]] = {}

    def add(self, reason: str, document: Spooled) -> None:
        """Count a document that goes."""
        self.documents.setdefault(reason, Counter())[document.input] += 1
        self.bytes.setdefault(reason, Counter())[document.input] += document.size
        file = self._job.plan.inputs[document.input]
        source = self._job.pipeline.sources[file.source].name
        place = {"source": source, "file": file.path, "offset": document.offset, "url": document.url}
        self._sampler.add(reason, document.text.decode(), place)

    def as_statistics(self) -> dict[str, Any]:
        """For a task's record: dropped and dropped_bytes, by reason and source; samples."""
        return {
            "dropped": {reason: by_source(counts, self._job) for reason, counts in self.documents.items()},
            "dropped_bytes": {reason: by_source(counts, self._job) for reason, counts in self.bytes.items()},
            "samples": self._sampler.rows(),
        }


def by_source(counts: Counter[int], job: Job) -> dict[str, int]:
    """Counts by input file as counts by source."""
    found: Counter[str] = Counter()
    for file, count in counts.items():
        found[job.pipeline.sources[job.plan.inputs[file].source].name] += count
    return dict(sorted(found.items()))


def read_spools(job: Job) -> list[Path]:
    """The folders of all read tasks' spools, in the order of the inputs."""
    return [job.task_folder("read", shard) for shard in range(len(job.plan.tasks))]


def in_bucket(job: Job, bucket: int) -> Iterator[Spooled]:
    """A bucket's documents in the order of the inputs, from wherever the last pass has put them."""
    buckets = job.plan.buckets
    grouped = buckets.in_group > 1
    return read_bucket([job.task_folder("regroup", buckets.group_of(bucket))] if grouped else read_spools(job), bucket)


def remaining(job: Job, bucket: int, losses: Losses) -> Iterator[Spooled]:
    """A bucket's documents that no earlier stage drops, in the order of the inputs; the others go into `losses`."""
    near, contaminated = near_duplicates_of(job, bucket), contaminated_of(job, bucket)
    for document in unique(in_bucket(job, bucket), lambda copy: losses.add(EXACT, copy)):
        if document.hash in near:
            losses.add(NEAR, document)
        elif document.hash in contaminated:
            losses.add(CONTAMINATED, document)
        else:
            yield document


def scores_path(job: Job, bucket: int) -> Path:
    """The scores of what remains of a bucket, float32 [documents, columns]."""
    return job.task_folder("score", bucket) / SCORES


def select(job: Job, bucket: int) -> tuple[list[Spooled], Scores | None, Losses]:
    """A bucket's documents that stay, shuffled; their scores [documents, columns] if any are asked for; what goes.

    Raises WorkError when the scores are of another number of documents.
    """
    losses = Losses(job)
    found = list(remaining(job, bucket, losses))
    if not job.pipeline.score:
        return shuffled(found, job.pipeline.seed), None, losses
    path = scores_path(job, bucket)
    scores: Scores = np.load(path, allow_pickle=False)
    columns = column_names(job.pipeline)
    if scores.shape != (len(found), len(columns)):
        raise WorkError(f"{path}: shape {scores.shape}, expected {(len(found), len(columns))}; remove it and run again")
    rows = {}
    for row, (document, reason) in enumerate(
        zip(found, reasons(columns, scores, bounds_of(job.pipeline)), strict=True)
    ):
        if reason is None:
            rows[document.hash] = row
        else:
            losses.add(reason, document)
    kept = shuffled([document for document in found if document.hash in rows], job.pipeline.seed)
    return kept, scores[[rows[document.hash] for document in kept]], losses
