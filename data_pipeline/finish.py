"""The last stage: close the accounts, publish the shard sets, and tidy up."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from data_pipeline.accounts import Statistics, make_ledger, refuse_empty_splits
from data_pipeline.dedup.stage import SIGNATURES
from data_pipeline.engine import (
    SHARD_FILE,
    WORK,
    Job,
    OutputFile,
    TaskResult,
    remove_partial_files,
    statistics_of,
)
from data_pipeline.read import QUARANTINE
from data_pipeline.score.scorers import column_names
from data_pipeline.spool import SPLITS
from data_pipeline.tokenizer import COPIED_FILES
from data_pipeline.transform.chain import account_problems, merge_samples
from data_pipeline.write import UNKNOWN, tokenizer_of
from megatron_joy import __version__
from megatron_joy.data.atomic import atomic_file, write_atomically
from megatron_joy.data.ledger import SAMPLES_NAME, write_ledger
from megatron_joy.data.manifest import (
    TOKENIZER_FOLDER,
    Accounts,
    Manifest,
    Provenance,
    ShardEntry,
    TokenizerIdentity,
    Totals,
    write_manifest,
)
from megatron_joy.data.shards import token_dtype
from megatron_joy.errors import WorkError

OTHER_SPLIT = {"train": "validation_split", "validation": "training_split"}
# Stages with a folder under `work`.
WITH_FILES = (
    *("read", "regroup", "match", "verify", "cluster", "overlap", "contamination", "score", "spans", "repeats"),
    *("write", "stream"),
)


def close_accounts(reads: list[dict[str, Any]], writes: list[dict[str, Any]]) -> tuple[int, Counter[str]]:
    """Records in, and those dropped by reason, counted independently by the readers and the writers.

    Raises WorkError when they disagree by a single document.
    """
    dropped: Counter[str] = Counter()
    records = documents = 0
    for task in reads:
        for name, source in task["sources"].items():
            if source["records"] != source["documents"] + sum(source["dropped"].values()):
                raise WorkError(
                    f"accounts of source {name}: {source['records']} records in, {source['documents']} documents out "
                    f"and {sum(source['dropped'].values())} dropped; this is a bug, the shards are not published"
                )
            given = source["read"]
            stages = source["transforms"]
            problems = account_problems(given["documents"], given["bytes_text"], stages)
            left = (stages[-1]["documents_out"], stages[-1]["bytes_out"]) if stages else tuple(given.values())
            if left != (source["documents"], source["bytes_text"]):
                problems.append(f"{left[0]} documents left the transforms, {source['documents']} were passed on")
            if problems:
                raise WorkError(
                    f"accounts of source {name}: {'; '.join(problems)}; this is a bug, the shards are not published"
                )
            records += source["records"]
            documents += source["documents"]
            dropped.update(source["dropped"])
    received = sum(task["documents_in"] for task in writes)
    later: Counter[str] = Counter()
    for task in writes:
        later.update({reason: sum(counts.values()) for reason, counts in task["dropped"].items()})
    written = sum(totals["documents"] for task in writes for totals in task["sources"].values())
    size_in = sum(source["bytes_text"] for task in reads for source in task["sources"].values())
    size_out = sum(totals["bytes_text"] for task in writes for totals in task["sources"].values())
    size_dropped = sum(size for task in writes for sizes in task["dropped_bytes"].values() for size in sizes.values())
    size_cut = sum(own["bytes"] for task in writes for own in task.get("repeated_lines", {}).values())
    if size_in != size_out + size_dropped + size_cut:
        raise WorkError(
            f"accounts: {size_in} bytes of text read, {size_dropped} dropped, {size_cut} cut, {size_out} written; this "
            "is a bug or a damaged work folder, the shards are not published"
        )
    if documents != received or received != later.total() + written:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(later.items()))
        raise WorkError(
            f"accounts: {documents} documents read, {received} received, {reasons}, {written} written; this is a "
            "bug or a damaged work folder, the shards are not published"
        )
    dropped.update(+later)
    return records, dropped


def unigram_entropy(counts: npt.NDArray[np.int64]) -> float:
    """Entropy in nats per token of token frequencies [vocabulary]."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _totals(parts: list[dict[str, int]]) -> Totals:
    return Totals(**{key: sum(part[key] for part in parts) for key in Totals.model_fields})


def _token_counts(job: Job, tasks: Statistics, identity: TokenizerIdentity) -> npt.NDArray[np.int64]:
    counts = np.zeros(identity.vocab_size, dtype=np.int64)
    for task in tasks:
        counts += np.load(job.folder / task["counts"], allow_pickle=False)
    return counts


def _manifest(job: Job, split: str, writes: Statistics, records: int, dropped: Counter[str]) -> Manifest:
    identity = tokenizer_of(job)
    own = [task for task in writes if task["split"] == split and task["shard"]]
    parts = [(name, totals) for task in own for name, totals in task["sources"].items()]
    elsewhere = sum(
        totals["documents"] for task in writes if task["split"] != split for totals in task["sources"].values()
    )
    reasons = dict(sorted(dropped.items())) | ({OTHER_SPLIT[split]: elsewhere} if elsewhere else {})
    names = [source.name for source in job.pipeline.sources]
    languages = sorted({name for task in own for name in task["languages"]} - {UNKNOWN})
    names_of = [item for task in own for item in task["languages"].items()]
    totals = _totals([part for _, part in parts])
    return Manifest(
        source=job.pipeline.name,
        split=split,
        tokenizer=identity,
        dtype="uint16" if token_dtype(identity.vocab_size).itemsize == 2 else "int32",
        totals=totals,
        accounts=Accounts(documents_in=records, documents_out=totals.documents, dropped=reasons),
        sources={name: _totals([part for owner, part in parts if owner == name]) for name in names},
        languages={
            name: _totals([part for owner, part in names_of if owner == name])
            for name in ([*languages, UNKNOWN] if languages else [])
        },
        unigram_entropy=unigram_entropy(_token_counts(job, own, identity)),
        score_columns=list(column_names(job.pipeline)),
        shards=[ShardEntry(**task["shard"]) for task in own],
        provenance=Provenance(
            pipeline=job.pipeline.name, pipeline_sha256=job.plan.pipeline_sha256, code_version=__version__
        ),
    )


def _publish(job: Job, manifest: Manifest) -> list[Path]:
    """Tokenizer first, manifest last; shards of an earlier, larger run go."""
    folder = job.folder / manifest.split
    written = []
    for name in COPIED_FILES:
        source = job.folder / TOKENIZER_FOLDER / name
        if source.is_file():
            write_atomically(folder / TOKENIZER_FOLDER / name, source.read_bytes())
            written.append(folder / TOKENIZER_FOLDER / name)
    kept = {f"{entry.name}{ending}" for entry in manifest.shards for ending in (".bin", ".idx")}
    kept |= {str(name) for entry in manifest.shards for name in (entry.provenance, entry.scores)}
    for path in folder.iterdir():
        if SHARD_FILE.fullmatch(path.name) and path.name not in kept:
            path.unlink()
    return [*written, write_manifest(folder, manifest)]


def _gather_quarantine(job: Job) -> Path:
    """One list of all that was put aside, in the order of the inputs."""
    path = job.folder / QUARANTINE
    with atomic_file(path) as stream:
        for shard in range(len(job.plan.tasks)):
            with open(job.task_folder(_reading(job), shard) / QUARANTINE, "rb") as part:
                shutil.copyfileobj(part, stream)
    return path


def _gather_samples(job: Job, writes: list[dict[str, Any]]) -> Path:
    """A few documents of each transform and reason that went, over all tasks."""
    path = job.folder / SAMPLES_NAME

    def part(shard: int) -> list[dict[str, Any]]:
        content = (job.task_folder(_reading(job), shard) / SAMPLES_NAME).read_bytes()
        return [orjson.loads(line) for line in content.splitlines()]

    rows = merge_samples([*map(part, range(len(job.plan.tasks))), *(task["samples"] for task in writes)])
    write_atomically(path, b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def _shard_files(job: Job, task: dict[str, Any]) -> list[OutputFile]:
    """The published files of a shard: a run is only whole while they are there."""
    entry = ShardEntry(**task["shard"])
    prefix = f"{task['split']}/{entry.name}"
    beside = ((entry.provenance, entry.provenance_blake3), (entry.scores, entry.scores_blake3))
    return [
        OutputFile(f"{prefix}.bin", entry.bin_bytes, entry.bin_blake3),
        OutputFile(f"{prefix}.idx", entry.idx_bytes, entry.idx_blake3),
        *(job.describe(job.folder / task["split"] / name, digest) for name, digest in beside if name is not None),
    ]


def _tokenizer_files(job: Job) -> list[Path]:
    """The files of the tokenizer of all sets, which is published too."""
    paths = (job.folder / TOKENIZER_FOLDER / name for name in COPIED_FILES)
    return [path for path in paths if path.is_file()]


def _reading(job: Job) -> str:
    """The stage that reads the inputs."""
    return "read" if job.pipeline.output.shuffle else "stream"


def _counted(job: Job) -> tuple[Statistics, Statistics]:
    """What every task counted that read, and that wrote a shard."""
    found = statistics_of(job, _reading(job), len(job.plan.tasks))
    if job.pipeline.output.shuffle:
        return found, statistics_of(job, "write", job.plan.buckets.total)
    writes = [half for task in found for half in task["writes"]]
    documents = Counter[str]()
    for half in writes:
        documents[half["split"]] += half["documents_in"]
    reads = [task["read"] for task in found]
    refuse_empty_splits(job, documents, lambda: reads)
    return reads, writes


def finish_task(job: Job, shard: int) -> TaskResult:
    """Close the accounts and publish one shard set for each split that has documents."""
    reads, writes = _counted(job)
    records, dropped = close_accounts(reads, writes)
    files = [*_tokenizer_files(job), _gather_quarantine(job), _gather_samples(job, writes)]
    files.append(write_ledger(job.folder, make_ledger(job, reads, writes)))
    for split in SPLITS:
        if any(task["split"] == split for task in writes):
            files += _publish(job, _manifest(job, split, writes, records, dropped))
    shards = [file for task in writes if task["shard"] for file in _shard_files(job, task)]
    notes = sorted({task["note"] for task in writes if task.get("note")})
    checked = sum(task.get("checked", 0) for task in writes)
    return TaskResult([*map(job.describe, files), *shards], {"notes": notes, "checked": checked})


def tidy(job: Job) -> None:
    """Remove what killed workers left and the partitioned text, once the shards are whole."""
    remove_partial_files(job.folder)
    if not job.pipeline.output.keep_work:
        for stage in WITH_FILES:
            shutil.rmtree(job.folder / WORK / stage, ignore_errors=True)
        if not job.pipeline.near_duplicates.keep_signatures:
            shutil.rmtree(job.folder / SIGNATURES, ignore_errors=True)
