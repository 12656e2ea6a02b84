"""The second level of the shuffle: groups divide the buckets, and a corpus gives the same bytes with it as without."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import spool
from data_pipeline.engine import statistics_of
from data_pipeline.spool import MOST_AT_ONCE, Buckets
from megatron_joy.data.manifest import load_manifest
from megatron_joy.data.verify import verify
from megatron_joy.errors import WorkError
from tests.data_pipeline.corpora import digests, plan_inline, run_inline, texts, write_jsonl, write_pipeline

EVERY_STAGE = """
seed = 3
[near_duplicates]
enabled = true
[[score]]
name = "length"
scorer = "heuristic"
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, with the same texts in both."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", texts(150))
    write_jsonl(folder / "b.jsonl", [*texts(40), *texts(150, seed=1)])
    return folder


@given(st.integers(1, 10**6), st.integers(0, 10**5))
def test_groups_divide_the_buckets_by_about_the_square_root_and_join_no_splits(train: int, validation: int) -> None:
    buckets = Buckets(train, validation, 0.1)
    if buckets.total <= MOST_AT_ONCE:
        assert (buckets.in_group, buckets.groups) == (1, buckets.total)
        return
    assert (buckets.in_group - 1) ** 2 < buckets.total <= buckets.in_group**2
    assert buckets.groups <= buckets.in_group + 1
    for first, count in ((0, train), (train, validation)):
        edges = {*range(first, first + count, max(1, count // 50)), *range(first, first + count, buckets.in_group)}
        for bucket in edges | {number - 1 for number in edges if number > first}:
            split, number = buckets.split_of(bucket)
            start = 0 if split == "train" else buckets.groups - -(-validation // buckets.in_group)
            assert buckets.group_of(bucket) == start + number // buckets.in_group
            assert buckets.split_of_group(buckets.group_of(bucket)) == split
    assert buckets.group_of(buckets.total - 1) == buckets.groups - 1


@pytest.mark.parametrize("extra", ["", EVERY_STAGE], ids=["plain", "every stage"])
def test_a_corpus_has_the_same_bytes_with_one_pass_and_with_two(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    one = run_inline(write_pipeline(corpus, tmp_path / "one", extra))
    assert one.stages["regroup"].shards(one.job) == 0
    monkeypatch.setattr(spool, "MOST_AT_ONCE", 3)
    two = run_inline(write_pipeline(corpus, tmp_path / "two", extra))
    count = two.stages["regroup"].shards(two.job)
    assert 2 < count < two.job.plan.buckets.total == one.job.plan.buckets.total
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    read = [row for task in statistics_of(two.job, "read", len(two.job.plan.tasks)) for row in task["sources"].values()]
    regrouped = statistics_of(two.job, "regroup", count)
    for key in ("documents", "bytes_text"):
        assert sum(task[key] for task in regrouped) == sum(row[key] for row in read)


def test_hundreds_of_shards_go_through_groups_and_verify(corpus: Path, tmp_path: Path) -> None:
    engine = run_inline(write_pipeline(corpus, tmp_path, validation_share=0.05, shard_megabytes=0.0004))
    total = engine.job.plan.buckets.total
    assert total > MOST_AT_ONCE
    assert engine.stages["regroup"].shards(engine.job) == engine.job.plan.buckets.groups < 30
    for split in ("train", "validation"):
        assert verify(tmp_path / split).problems == []
    wanted = {*texts(150), *texts(150, seed=1)}
    assert sum(load_manifest(tmp_path / split).totals.documents for split in ("train", "validation")) == len(wanted)


def test_a_group_is_redone_alone_and_a_damaged_one_stops_its_shards(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "MOST_AT_ONCE", 3)
    engine = plan_inline(write_pipeline(corpus, tmp_path))
    for stage in ("read", "regroup", "tokenizer"):
        for shard in range(engine.stages[stage].shards(engine.job)):
            engine.run_task(stage, shard)
    data = engine.job.task_folder("regroup", 1) / "spool.bin"
    content = data.read_bytes()
    data.unlink()
    assert dict(engine.unfinished())["regroup"] == [1]
    engine.run_task("regroup", 1)
    assert data.read_bytes() == content
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    buckets = engine.job.plan.buckets
    last = max(bucket for bucket in range(buckets.total) if buckets.group_of(bucket) == 1)  # its frame is the last one
    with pytest.raises(WorkError, match=r"regroup/00001/spool\.bin: damaged at byte "):
        engine.run_task("write", last)


@contextmanager
def few_open_files(more: int) -> Iterator[None]:
    """This process may open `more` files beside those that it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = set(map(int, os.listdir("/proc/self/fd")))
    free = (number for number in range(soft) if number not in taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, more, None)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_read_tasks_than_a_process_may_open_files(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "MOST_AT_ONCE", 3)
    engine = plan_inline(write_pipeline(corpus, tmp_path, shard_megabytes=0.002))
    tasks: Any = {stage: range(engine.stages[stage].shards(engine.job)) for stage in ("read", "regroup")}
    assert len(tasks["read"]) > 40
    with few_open_files(10):
        for stage, shards in tasks.items():
            for shard in shards:
                engine.run_task(stage, shard)
    assert sum(task["documents"] for task in statistics_of(engine.job, "regroup", len(tasks["regroup"]))) > 300
