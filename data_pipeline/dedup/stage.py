"""Near-duplicates as stages of a pipeline: `sign` and `verify` (a task for each read task), `match` (a task for each
band), `cluster` (one task).

`sign` writes a signature part of each read task's documents. `match` pairs documents that agree in its band, over all
parts, with the parts of `near_duplicates.against` before them. `verify` gathers all bands' pairs whose larger document
is of its part and keeps those that are near-duplicates. `cluster` joins these, and writes for each bucket the hashes of
the texts that go. A text that is kept anywhere is never on that list: exact copies are the write stage's business.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.dedup.cluster import find_clusters
from data_pipeline.dedup.external import MEMORY_ROWS, RowSorter, group_starts, read_rows, rows_of
from data_pipeline.dedup.match import Settings, match_band
from data_pipeline.dedup.minhash import MinHash, Numbers
from data_pipeline.dedup.store import PART, Store, write_part
from data_pipeline.dedup.verify import distinct_pairs, near_pairs
from data_pipeline.engine import Job, TaskResult
from data_pipeline.spool import HASH_BYTES, read_all, write_index
from megatron_joy.data.atomic import atomic_file
from megatron_joy.errors import UserError

SIGNATURES = "signatures"
TEXT_HASHES = "text_hashes.bin"
OFFSETS, PAIRS, PLACES = "offsets.npy", "pairs.bin", "places.npy"
DROPPED = "dropped.bin"


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


@lru_cache(maxsize=1)
def _parts_of(folders: tuple[str, ...]) -> list[Path]:
    found = []
    for folder in folders:
        parts = sorted(path.parent for path in Path(folder).glob(f"*/{PART}"))
        if not parts:
            raise UserError(
                f"near_duplicates.against: {folder} holds no signatures; give the folder `{SIGNATURES}` of a pipeline "
                "that ran with near_duplicates.keep_signatures = true"
            )
        found += parts
    return found


def earlier_parts(job: Job) -> list[Path]:
    """The parts of earlier pipelines' `signatures` folders, in order. Raises UserError where there is none."""
    folders = job.pipeline.near_duplicates.against
    for folder in folders:
        if Path(folder).resolve() == (job.folder / SIGNATURES).resolve():
            raise UserError(f"near_duplicates.against: {folder} is this pipeline's own; name only earlier pipelines'")
    return _parts_of(tuple(folders))


def _store(job: Job, offsets: Numbers | None = None) -> Store:
    earlier = earlier_parts(job)
    own = [part_folder(job, number) for number in range(len(job.plan.tasks))]
    return Store([*earlier, *own], MinHash(), len(earlier), offsets)


def _settings(job: Job) -> Settings:
    section = job.pipeline.near_duplicates
    return Settings(section.threshold, section.bands)


def match_task(job: Job, band: int) -> TaskResult:
    """Pair the documents that agree in one band; notes where each of this run's parts has its pairs."""
    folder, store = job.task_folder("match", band), _store(job)
    first_of_parts = store.offsets[len(earlier_parts(job)) :]
    before = np.zeros(len(first_of_parts), dtype=np.int64)  # pairs before each of the parts, and all of them
    with atomic_file(folder / PAIRS) as stream:
        for rows in match_band(store, band, _settings(job), folder / "scratch"):
            before += np.searchsorted(rows[:, 0], first_of_parts.astype(np.uint64))
            stream.write(np.ascontiguousarray(rows).data)
    write_index(folder / PLACES, before)
    write_index(folder / OFFSETS, store.offsets)
    files = [job.describe_scratch(folder / name) for name in (PAIRS, PLACES, OFFSETS)]
    return TaskResult(files, {"pairs": int(before[-1])})


def verify_task(job: Job, shard: int) -> TaskResult:
    """Keep the pairs of one part's documents, with each other and with earlier ones, that are near-duplicates."""
    settings = _settings(job)
    folders = [job.task_folder("match", band) for band in range(settings.bands)]
    store = _store(job, np.load(folders[0] / OFFSETS, allow_pickle=False))
    runs = []
    for folder in folders:
        start, stop = np.load(folder / PLACES, allow_pickle=False)[shard : shard + 2].tolist()
        runs.append(read_rows(folder / PAIRS)[start:stop])
    path = job.task_folder("verify", shard) / PAIRS
    counts: Counter[str] = Counter(candidate_pairs=0, verified_pairs=0)
    with atomic_file(path) as stream:
        for candidates in distinct_pairs(runs, settings.memory_rows):
            pairs = near_pairs(store, candidates, settings.threshold)
            counts.update(candidate_pairs=len(candidates), verified_pairs=len(pairs))
            stream.write(rows_of(pairs[:, 0], pairs[:, 1]).data)
    return TaskResult([job.describe_scratch(path)], dict(counts))


def _verified(job: Job) -> Iterator[Numbers]:
    for shard in range(len(job.plan.tasks)):
        rows = read_rows(job.task_folder("verify", shard) / PAIRS)
        for start in range(0, len(rows), MEMORY_ROWS):
            yield rows[start : start + MEMORY_ROWS].astype(np.int64)


def _hashes_in_order(job: Job, store: Store, chosen: Iterable[Numbers], folder: Path, path: Path) -> RowSorter:
    """Text hashes of documents that go, and of those that stay for them, into a file in the order of the inputs.

    Returns (bucket, 2 x place of the hash in that file + 1 if it stays), to be sorted.
    """
    first = store.existing
    by_number, by_bucket = RowSorter(folder / "numbers"), RowSorter(folder / "buckets")
    for gone, kept in (pairs.T for pairs in chosen):
        by_number.add(rows_of(gone, np.zeros_like(gone)))
        here = np.unique(kept[kept >= first])
        by_number.add(rows_of(here, np.ones_like(here)))
    earlier, place = len(earlier_parts(job)), 0
    with open(path, "wb") as stream:
        for block in by_number.blocks():
            edges = np.searchsorted(block[:, 0], store.offsets[earlier:].astype(np.uint64))
            for shard in np.flatnonzero(np.diff(edges)).tolist():
                rows = block[edges[shard] : edges[shard + 1]]
                of_part = np.memmap(part_folder(job, shard) / TEXT_HASHES, np.uint8, "r").reshape(-1, HASH_BYTES)
                hashes = of_part[rows[:, 0].astype(np.int64) - store.offsets[earlier + shard]]
                stream.write(hashes.data)
                places = np.arange(place, place + len(rows), dtype=np.uint64)
                by_bucket.add(rows_of(job.plan.buckets.buckets_of(hashes), 2 * places + rows[:, 1]))
                place += len(rows)
    return by_bucket


def _list_dropped(job: Job, store: Store, chosen: Iterable[Numbers], folder: Path) -> list[Path]:
    """Write the hashes of the texts that go, each once, by bucket and in a bucket by hash; and where buckets start."""
    scratch = folder / "scratch" / "hashes"
    by_bucket = _hashes_in_order(job, store, chosen, folder / "scratch", scratch)
    every = np.memmap(scratch, np.uint8, "r").reshape(-1, HASH_BYTES) if scratch.stat().st_size else None
    counts = np.zeros(job.plan.buckets.total, dtype=np.int64)
    with atomic_file(folder / DROPPED) as stream:
        for block in by_bucket.blocks():
            assert every is not None, "a row has a hash"
            starts = group_starts(block[:, 0])
            for rows in np.split(block, starts[1:-1]):
                gone, kept = (_distinct(every, rows[rows[:, 1] % 2 == stays, 1] // 2) for stays in (0, 1))
                listed = sorted(gone - kept)
                counts[rows[0, 0]] = len(listed)
                stream.write(b"".join(listed))
    scratch.unlink()
    write_index(folder / PLACES, np.concatenate([[0], np.cumsum(counts)]))
    return [folder / DROPPED, folder / PLACES]


def _distinct(hashes: npt.NDArray[np.uint8], places: npt.NDArray[np.uint64]) -> set[bytes]:
    return {row.tobytes() for row in hashes[places.astype(np.int64)]}


def cluster_task(job: Job, shard: int) -> TaskResult:
    """Find clusters over all parts and list what goes, for each bucket."""
    store = _store(job, np.load(job.task_folder("match", 0) / OFFSETS, allow_pickle=False))
    folder, sizes = job.task_folder("cluster", 0), Counter[int]()
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    chosen = find_clusters(store, _verified(job), folder / "scratch", sizes)
    files = [job.describe(path) for path in _list_dropped(job, store, chosen, folder)]
    (folder / "scratch").rmdir()
    return TaskResult(files, {"clusters_by_size": {str(size): count for size, count in sorted(sizes.items())}})


def near_duplicates_of(job: Job, bucket: int) -> set[bytes]:
    """Hashes of the texts of a bucket that are near-duplicates of others; none when the pipeline does not ask."""
    if not job.pipeline.near_duplicates.enabled:
        return set()
    folder = job.task_folder("cluster", 0)
    start, stop = (HASH_BYTES * int(place) for place in np.load(folder / PLACES, mmap_mode="r")[bucket : bucket + 2])
    with open(folder / DROPPED, "rb") as stream:
        stream.seek(start)
        content = stream.read(stop - start)
    return {content[place : place + HASH_BYTES] for place in range(0, len(content), HASH_BYTES)}


def near_settings(job: Job) -> Any:
    """What of a pipeline the clusters depend on, existing parts too; None when it does not ask for them."""
    section = job.pipeline.near_duplicates
    if not section.enabled:
        return None
    parts = [(folder / PART).read_text() for folder in earlier_parts(job)]
    return [section.threshold, section.bands, parts, MinHash().fingerprint]
