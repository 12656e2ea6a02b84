"""The partition by hash: each text in its bucket, nothing lost, order and split functions of the text alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import spool as module
from data_pipeline.spool import (
    Spooled,
    SpoolWriter,
    divide,
    read_bucket,
    shuffled,
    spool_paths,
    text_hash,
    unique,
    write_index,
)
from megatron_joy.errors import WorkError


def spool(folder: Path, texts: list[bytes], buckets: module.Buckets) -> None:
    data, index = spool_paths(folder)
    with open(data, "wb") as stream:
        writer = SpoolWriter(stream, buckets.bucket_of, buckets.total)
        for number, text in enumerate(texts):
            licence, url = ("MIT", None) if number % 2 else (None, f"https://example.org/{number}")
            language = "zh" if number % 3 else None
            writer.add(Spooled(text_hash(text), 7, number, licence, text, url, language))
        writer.flush()
    write_index(index, writer.index())


@settings(deadline=None, max_examples=40)
@given(st.lists(st.binary(max_size=50), max_size=60), st.integers(1, 100), st.floats(0, 0.9))
def test_every_document_comes_out_once_in_its_bucket_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[bytes], run_bytes: int, share: float
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    buckets = divide(10_000, share, 3000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LARGEST_RUN", run_bytes)
        spool(folder, texts, buckets)
    found = [list(read_bucket([folder], bucket)) for bucket in range(buckets.total)]
    for bucket, documents in enumerate(found):
        assert all(buckets.bucket_of(text_hash(document.text)) == bucket for document in documents)
        assert [document.offset for document in documents] == sorted(document.offset for document in documents)
    everything = sorted((document for documents in found for document in documents), key=lambda d: d.offset)
    assert [document.text for document in everything] == texts
    assert [document.licence for document in everything] == ["MIT" if n % 2 else None for n in range(len(texts))]
    assert [document.url for document in everything] == [
        None if n % 2 else f"https://example.org/{n}" for n in range(len(texts))
    ]
    assert [document.language for document in everything] == ["zh" if n % 3 else None for n in range(len(texts))]
    assert all(document.input == 7 and document.hash == text_hash(document.text) for document in everything)


def test_duplicates_are_dropped_after_the_first() -> None:
    documents = [Spooled(text_hash(text), file, 0, None, text) for file, text in enumerate([b"a", b"b", b"a", b"a"])]
    copies: list[Spooled] = []
    assert [document.input for document in unique(iter(documents), copies.append)] == [0, 1]
    assert [document.input for document in copies] == [2, 3]


def test_the_split_has_its_share_and_no_seed_changes_it() -> None:
    buckets = divide(10**9, 0.1, 10**8)
    splits = Counter(buckets.split_of(buckets.bucket_of(text_hash(str(n).encode())))[0] for n in range(20_000))
    assert 0.09 < splits["validation"] / 20_000 < 0.11
    assert (buckets.train, buckets.validation) == (9, 1)
    assert divide(1000, 0.0, 10**8) == module.Buckets(1, 0, 0.0)


def test_buckets_are_even() -> None:
    buckets = divide(10**9, 0.0, 10**8)
    counts = Counter(buckets.bucket_of(text_hash(str(n).encode())) for n in range(50_000))
    assert len(counts) == 10
    assert max(counts.values()) < 1.1 * min(counts.values())


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=50), st.integers(1, 10**6), st.integers(0, 10**5))
def test_many_hashes_have_the_buckets_of_each_alone(hashes: list[bytes], train: int, validation: int) -> None:
    buckets = module.Buckets(train, validation, 0.3 if validation else 0.0)
    found = buckets.buckets_of(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16))
    assert found.tolist() == [buckets.bucket_of(text) for text in hashes]


def test_the_order_depends_on_seed_and_texts_not_on_arrival() -> None:
    documents = [Spooled(text_hash(str(n).encode()), n, 0, None, str(n).encode()) for n in range(500)]
    order = [document.input for document in shuffled(documents, 1)]
    assert order == [document.input for document in shuffled(documents[::-1], 1)]
    assert order != [document.input for document in shuffled(documents, 2)]
    assert sorted(order) == list(range(500))
    assert abs(np.corrcoef(order, range(500))[0, 1]) < 0.15


def test_a_damaged_spool_stops_the_task_with_one_line(tmp_path: Path) -> None:
    buckets = divide(1000, 0.0, 10_000)
    spool(tmp_path, [b"text" * 100] * 3, buckets)
    data, _ = spool_paths(tmp_path)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(WorkError, match=r"spool\.bin: damaged at byte 0"):
        list(read_bucket([tmp_path], 0))
