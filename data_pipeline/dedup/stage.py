"""Near-duplicates as stages of a pipeline: `sign` (one task for each read task), `cluster` (one task).

`sign` writes a signature part of each read task's documents. `cluster` finds the clusters over all parts, with the
parts of `near_duplicates.against` before them, and writes for each bucket the hashes of the texts that go. A text that
is kept anywhere is never on that list: exact copies are the write stage's business.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.dedup.cluster import Clusters, Settings, find_clusters
from data_pipeline.dedup.minhash import MinHash, Numbers
from data_pipeline.dedup.store import PART, Store, open_part, write_part
from data_pipeline.engine import Job, TaskResult
from data_pipeline.spool import HASH_BYTES, read_all
from megatron_joy.data.atomic import atomic_file, write_atomically
from megatron_joy.errors import UserError

SIGNATURES = "signatures"
TEXT_HASHES = "text_hashes.bin"


def part_folder(job: Job, shard: int) -> Path:
    """Where the signatures of a read task's documents are; beside the shards, since later pipelines may read them."""
    return job.folder / SIGNATURES / f"{shard:05d}"


def sign_task(job: Job, shard: int) -> TaskResult:
    """Sign the documents of one read task."""
    folder = part_folder(job, shard)
    hashes = folder / TEXT_HASHES
    with atomic_file(hashes) as stream:

        def documents() -> Iterator[tuple[bytes, float]]:
            for document in read_all(job.task_folder("read", shard)):
                stream.write(document.hash)
                yield document.text, 0.0

        files = write_part(folder, MinHash(), documents())
    return TaskResult([job.describe_scratch(path) for path in (*files, hashes)], {})


def existing_parts(job: Job) -> list[Path]:
    """The parts of earlier pipelines' `signatures` folders, in order. Raises UserError where there is none."""
    found = []
    for folder in job.pipeline.near_duplicates.against:
        if Path(folder).resolve() == (job.folder / SIGNATURES).resolve():
            raise UserError(f"near_duplicates.against: {folder} is this pipeline's own; name only earlier pipelines'")
        parts = sorted(path.parent for path in Path(folder).glob(f"*/{PART}"))
        if not parts:
            raise UserError(
                f"near_duplicates.against: {folder} holds no signatures; give the folder `{SIGNATURES}` of a pipeline "
                "that ran with near_duplicates.keep_signatures = true"
            )
        found += parts
    return found


def _dropped_hashes(job: Job, clusters: Clusters, first: int) -> list[bytes]:
    """Hashes of the texts that go, each once; `first`: number of this run's first document."""
    parts = [part_folder(job, shard) / TEXT_HASHES for shard in range(len(job.plan.tasks))]
    hashes = np.concatenate([np.fromfile(path, dtype=f"S{HASH_BYTES}") for path in parts])

    def of(numbers: Numbers) -> list[bytes]:
        # numpy cuts zero bytes at the end of a string.
        return [text.ljust(HASH_BYTES, b"\0") for text in hashes[numbers - first].tolist()]

    gone, kept = clusters.dropped.T
    here = kept >= first
    return sorted(set(of(gone)) - set(of(kept[here])))


def cluster_task(job: Job, shard: int) -> TaskResult:
    """Find near-duplicates over all parts and list what goes, for each bucket."""
    section, method = job.pipeline.near_duplicates, MinHash()
    old = [open_part(folder, method, existing=True) for folder in existing_parts(job)]
    new = [open_part(part_folder(job, number), method) for number in range(len(job.plan.tasks))]
    folder = job.task_folder("cluster", 0)
    settings = Settings(threshold=section.threshold, bands=section.bands)
    clusters = find_clusters(Store([*old, *new]), settings, folder / "scratch")
    buckets: dict[int, list[bytes]] = {bucket: [] for bucket in range(job.plan.buckets.total)}
    for text in _dropped_hashes(job, clusters, sum(part.documents for part in old)):
        buckets[job.plan.buckets.bucket_of(text)].append(text)
    files = []
    for bucket, hashes in buckets.items():
        path = dropped_path(job, bucket)
        write_atomically(path, b"".join(hashes))
        files.append(job.describe(path))
    sizes = {str(size): count for size, count in sorted(clusters.sizes.items())}
    statistics: dict[str, Any] = {
        "clusters_by_size": sizes,
        "candidate_pairs": clusters.candidates,
        "verified_pairs": clusters.verified,
    }
    return TaskResult(files, statistics)


def dropped_path(job: Job, bucket: int) -> Path:
    """The hashes of a bucket's texts that go, one after another."""
    return job.task_folder("cluster", 0) / f"dropped_{bucket:05d}.bin"


def near_duplicates_of(job: Job, bucket: int) -> set[bytes]:
    """Hashes of the texts of a bucket that are near-duplicates of others; none when the pipeline does not ask."""
    if not job.pipeline.near_duplicates.enabled:
        return set()
    content = dropped_path(job, bucket).read_bytes()
    return {content[place : place + HASH_BYTES] for place in range(0, len(content), HASH_BYTES)}


def near_settings(job: Job) -> Any:
    """What of a pipeline the clusters depend on, existing parts too; None when it does not ask for them."""
    section = job.pipeline.near_duplicates
    if not section.enabled:
        return None
    parts = [(folder / PART).read_text() for folder in existing_parts(job)]
    return [section.threshold, section.bands, parts, MinHash().fingerprint]
