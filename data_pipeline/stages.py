"""The stages from text to shards: read (read.py), regroup (regroup.py), sign, match, verify, cluster (dedup/), overlap,
contamination (decontaminate/), tokenizer, score (score/), spans, repeats (dedup/), write (write.py), finish
(finish.py); without a shuffle only tokenizer, stream (stream.py), finish.

Each task is a function of the job and its shard.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.accounts import refuse_empty_splits
from data_pipeline.config import Pipeline
from data_pipeline.decontaminate.stage import contamination_settings, contamination_task, overlap_task
from data_pipeline.dedup.lines_stage import lines_settings, repeats_task, repeats_tasks, spans_task, spans_tasks
from data_pipeline.dedup.stage import cluster_task, match_task, near_settings, sign_task, verify_task
from data_pipeline.encode import oracle_of
from data_pipeline.engine import Job, Stage, TaskResult, statistics_of
from data_pipeline.finish import finish_task
from data_pipeline.inventory import MEGABYTE
from data_pipeline.read import read_settings, read_task, read_tasks
from data_pipeline.regroup import regroup_task, regroup_tasks
from data_pipeline.score.stage import bound_settings, score_settings, score_task
from data_pipeline.select import in_bucket, read_spools
from data_pipeline.spool import spool_paths, unique
from data_pipeline.stream import stream_task, stream_tasks
from data_pipeline.tokenizer import (
    COPIED_FILES,
    TOKENIZER_FILE,
    copy_tokenizer,
    identify,
    package_folder,
    save_tokenizer,
    train_tokenizer,
)
from data_pipeline.write import write_task, write_tasks
from megatron_joy.data.checksum import file_sha256
from megatron_joy.data.manifest import TOKENIZER_FOLDER


def _require_documents(job: Job) -> None:
    """Refuse a corpus that leaves a split without a document, before anything is trained or written."""
    documents: Counter[str] = Counter()
    for folder in read_spools(job):
        rows = np.load(spool_paths(folder)[1], allow_pickle=False)
        for group, number in enumerate(np.bincount(rows[:, 0], weights=rows[:, 3]).tolist()):
            documents[job.plan.buckets.split_of_group(group)] += int(number)
    refuse_empty_splits(job, documents, lambda: statistics_of(job, "read", len(job.plan.tasks)))


def _sample(job: Job) -> Iterator[str]:
    """Training documents for the tokenizer: whole buckets, which are random samples, up to the size asked for."""
    room = job.pipeline.tokenizer.sample_megabytes * MEGABYTE
    for bucket in range(job.plan.buckets.train):
        for document in unique(in_bucket(job, bucket)):
            if room <= 0:
                return
            room -= document.size
            yield document.text.decode()


def _given_tokenizer(pipeline: Pipeline) -> Path | None:
    """The folder of a tokenizer that is not trained here."""
    section = pipeline.tokenizer
    if section.package is not None:
        return package_folder(section.package)
    return Path(section.folder) if section.folder is not None else None


def check_tokenizer(pipeline: Pipeline) -> None:
    """Raises UserError when the given tokenizer is none: that should not come up after all inputs were read.

    One that an earlier run has copied is not loaded again.
    """
    given = _given_tokenizer(pipeline)
    if given is None:
        return
    identify(given, pipeline.tokenizer.eod_token)
    copy = pipeline.folder / TOKENIZER_FOLDER / TOKENIZER_FILE
    if not copy.is_file() or file_sha256(copy) != file_sha256(given / TOKENIZER_FILE):
        oracle_of(given)


def tokenizer_task(job: Job, shard: int) -> TaskResult:
    """Train the tokenizer on a sample, or copy the given one, into the output folder."""
    if job.pipeline.output.shuffle:
        _require_documents(job)
    section = job.pipeline.tokenizer
    folder = job.folder / TOKENIZER_FOLDER
    given = _given_tokenizer(job.pipeline)
    if given is not None:
        identify(given, section.eod_token)
        oracle_of(given)
        files = copy_tokenizer(given, folder, section.eod_token)
    else:
        assert section.vocab_size is not None, "the schema asks for one of folder, package and vocab_size"
        trained = train_tokenizer(_sample(job), section.vocab_size, section.special_tokens)
        eod = section.eod_token or section.special_tokens[0]
        files = save_tokenizer(trained, section.special_tokens, eod, folder)
    return TaskResult([job.describe(path) for path in files], identify(folder).model_dump())


def _tokenizer_settings(job: Job) -> Any:
    given = _given_tokenizer(job.pipeline)
    # A folder whose files change between two runs is another tokenizer; its configuration says what ends a document.
    names = [name for name in COPIED_FILES if given and (given / name).is_file()]
    digests = {name: file_sha256(given / name) for name in names} if given else {}
    return [job.pipeline.tokenizer.model_dump(), digests]


def _near_tasks(job: Job) -> int:
    return len(job.plan.tasks) if job.pipeline.near_duplicates.enabled else 0


def _match_tasks(job: Job) -> int:
    section = job.pipeline.near_duplicates
    return section.bands if section.enabled else 0


def _overlap_tasks(job: Job) -> int:
    return len(job.plan.tasks) if job.pipeline.decontaminate.enabled else 0


def _score_tasks(job: Job) -> int:
    return job.plan.buckets.total if job.pipeline.score else 0


STAGES = [
    Stage("read", "reading inputs", 6, (), read_settings, read_tasks, read_task),
    Stage("regroup", "sorting groups into shards", 1, ("read",), lambda job: None, regroup_tasks, regroup_task),
    Stage("sign", "signing documents", 1, ("read",), near_settings, _near_tasks, sign_task),
    Stage("match", "finding candidates", 1, ("sign",), near_settings, _match_tasks, match_task),
    Stage("verify", "comparing candidates", 1, ("sign", "match"), near_settings, _near_tasks, verify_task),
    Stage(
        "cluster",
        "choosing from near-duplicates",
        2,
        ("sign", "match", "verify"),
        near_settings,
        lambda job: int(job.pipeline.near_duplicates.enabled),
        cluster_task,
    ),
    Stage(
        "overlap", "looking for evaluation items", 1, ("read",), contamination_settings, _overlap_tasks, overlap_task
    ),
    Stage(
        "contamination",
        "judging evaluation items",
        1,
        ("cluster", "overlap"),
        contamination_settings,
        lambda job: int(job.pipeline.decontaminate.enabled),
        contamination_task,
    ),
    Stage(
        "tokenizer",
        "preparing the tokenizer",
        2,
        ("read", "regroup"),
        _tokenizer_settings,
        lambda job: 1,
        tokenizer_task,
    ),
    # After the tokenizer, which looks at no scores: another scorer does not train it again.
    Stage(
        "score",
        "scoring documents",
        1,
        ("read", "regroup", "cluster", "contamination"),
        score_settings,
        _score_tasks,
        score_task,
    ),
    Stage(
        "spans",
        "hashing lines",
        1,
        ("read", "regroup", "cluster", "contamination", "score"),
        lines_settings,
        spans_tasks,
        spans_task,
    ),
    Stage("repeats", "finding repeated lines", 1, ("spans",), lines_settings, repeats_tasks, repeats_task),
    Stage(
        "write",
        "encoding and writing",
        5,
        ("read", "regroup", "cluster", "contamination", "score", "repeats", "tokenizer"),
        lambda job: [job.pipeline.seed, bound_settings(job)],
        write_tasks,
        write_task,
    ),
    Stage("stream", "encoding and writing", 2, ("tokenizer",), lambda job: None, stream_tasks, stream_task),
    Stage(
        "finish",
        "closing the accounts",
        3,
        ("read", "regroup", "cluster", "contamination", "score", "repeats", "tokenizer", "write", "stream"),
        lambda job: job.plan.pipeline_sha256,
        lambda job: 1,
        finish_task,
    ),
]
