"""Shards are plain Megatron files, appear whole or not at all, and are refused when torn."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from megatron_joy.data.shards import (
    HEADER,
    LONGEST_DOCUMENT,
    ShardReader,
    ShardWriter,
    bin_path,
    idx_path,
    index_bytes,
    token_dtype,
)
from megatron_joy.errors import UserError

UINT16 = np.dtype("<u2")
DOCUMENTS = [[5, 6, 7, 0], [0], [65_000, 1, 0]]


def write(prefix: Path, documents: list[list[int]], dtype: np.dtype = UINT16) -> ShardWriter:
    with ShardWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(np.array(document), np.array([len(document)]))
    return writer


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_megatron_core_reads_the_same_tokens(tmp_path: Path, dtype: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    write(tmp_path / "shard", DOCUMENTS, np.dtype(dtype))
    theirs = IndexedDataset(str(tmp_path / "shard"))
    assert [theirs[number].tolist() for number in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_our_files_have_the_bytes_of_megatron_cores_builder_and_we_read_them(tmp_path: Path, dtype: type) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(bin_path(tmp_path / "theirs")), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(idx_path(tmp_path / "theirs")))
    write(tmp_path / "ours", DOCUMENTS, np.dtype(dtype).newbyteorder("<"))
    for path in (bin_path, idx_path):
        assert path(tmp_path / "ours").read_bytes() == path(tmp_path / "theirs").read_bytes()
    reader = ShardReader(tmp_path / "theirs")
    assert [reader.document(number).tolist() for number in range(len(reader))] == DOCUMENTS


def test_a_foreign_document_of_several_sequences_is_read_as_one(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(bin_path(tmp_path / "theirs")), dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(torch.tensor([6, 7]), [2])
    builder.finalize(str(idx_path(tmp_path / "theirs")))
    reader = ShardReader(tmp_path / "theirs")
    assert [reader.document(number).tolist() for number in range(len(reader))] == [[1, 2, 3, 4, 5], [6, 7]]
    assert [reader.document_of(position) for position in range(7)] == [0, 0, 0, 0, 0, 1, 1]


def test_dtype_switches_where_megatron_switches() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for vocab_size in (1, 65_499, 65_500, 65_536, 129_280):
        assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


@settings(deadline=None, max_examples=25)
@given(st.lists(hnp.arrays(np.int64, st.integers(1, 40), elements=st.integers(0, 65_535)), min_size=1, max_size=20))
def test_any_documents_come_back_and_every_token_knows_its_document(
    tmp_path_factory: pytest.TempPathFactory, documents: list[np.ndarray]
) -> None:
    prefix = tmp_path_factory.mktemp("shards") / "shard"
    with ShardWriter(prefix, UINT16) as writer:
        half = len(documents) // 2
        for part in (documents[:half], documents[half:]):
            if part:
                writer.add(np.concatenate(part), np.array([len(document) for document in part]))
    reader = ShardReader(prefix)
    assert [reader.document(number).tolist() for number in range(len(reader))] == [d.tolist() for d in documents]
    owners = [number for number, document in enumerate(documents) for _ in document]
    assert [reader.document_of(position) for position in range(len(reader.tokens))] == owners


def test_summary_is_what_lies_on_disk(tmp_path: Path) -> None:
    from blake3 import blake3

    summary = write(tmp_path / "shard", DOCUMENTS).summary
    assert summary is not None
    data, index = bin_path(tmp_path / "shard").read_bytes(), idx_path(tmp_path / "shard").read_bytes()
    assert (summary.documents, summary.tokens) == (3, 8)
    assert (summary.bin_bytes, summary.bin_blake3) == (len(data), blake3(data).hexdigest())
    assert (summary.idx_bytes, summary.idx_blake3) == (len(index), blake3(index).hexdigest())


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "shard", UINT16)
    writer.add(np.array([1, 0]), np.array([2]))
    with pytest.raises(ValueError, match="2 tokens for lengths that sum to 3"), writer:
        writer.add(np.array([1, 0]), np.array([3]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("token", [-1, 65_536])
def test_a_token_that_does_not_fit_is_refused(tmp_path: Path, token: int) -> None:
    with pytest.raises(UserError, match=r"shard\.bin: token ids .* do not fit uint16"):
        write(tmp_path / "shard", [[token, 0]])
    assert list(tmp_path.iterdir()) == []


def test_an_empty_shard_can_be_opened(tmp_path: Path) -> None:
    write(tmp_path / "shard", [])
    reader = ShardReader(tmp_path / "shard")
    assert (len(reader), len(reader.tokens)) == (0, 0)


@pytest.mark.parametrize(("suffix", "by"), [(".bin", -1), (".bin", 1), (".idx", -1), (".idx", 1)])
def test_a_file_that_is_one_byte_short_or_long_is_refused_with_one_line(tmp_path: Path, suffix: str, by: int) -> None:
    write(tmp_path / "shard", DOCUMENTS)
    path = tmp_path / f"shard{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[:by] if by < 0 else content + b"\0")
    with pytest.raises(UserError) as error:
        ShardReader(tmp_path / "shard")
    line = str(error.value)
    assert str(path) in line
    assert f"{len(content) + by} bytes, expected" in line
    assert "\n" not in line


@pytest.mark.parametrize("length", [0, 1, HEADER.size - 1, HEADER.size])
def test_an_index_cut_in_its_header_is_refused(tmp_path: Path, length: int) -> None:
    write(tmp_path / "shard", DOCUMENTS)
    path = idx_path(tmp_path / "shard")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=f"{length} bytes, expected"):
        ShardReader(tmp_path / "shard")


@settings(deadline=None, max_examples=25)
@given(st.integers(0, HEADER.size - 1), st.integers(1, 255))
def test_any_flipped_byte_of_the_header_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, flip: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    write(folder / "shard", DOCUMENTS)
    content = bytearray(idx_path(folder / "shard").read_bytes())
    content[place] ^= flip
    idx_path(folder / "shard").write_bytes(content)
    # The one change without a contradiction: the dtype code of int16 instead of uint16, which have one size.
    if content[struct.calcsize("<9sQ")] == 3:
        assert ShardReader(folder / "shard").dtype == np.int16
        return
    with pytest.raises(UserError) as error:
        ShardReader(folder / "shard")
    assert "\n" not in str(error.value)


def test_a_multimodal_index_is_named_as_such(tmp_path: Path) -> None:
    write(tmp_path / "shard", DOCUMENTS)
    with open(idx_path(tmp_path / "shard"), "ab") as stream:
        stream.write(b"\0" * len(DOCUMENTS))
    with pytest.raises(UserError, match="multimodal"):
        ShardReader(tmp_path / "shard")


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    write(tmp_path / "shard", DOCUMENTS)
    (tmp_path / f"shard{missing}").unlink()
    with pytest.raises(UserError, match=f"shard{missing}: not there"):
        ShardReader(tmp_path / "shard")


def test_pointers_do_not_overflow_where_tokens_pass_four_billion() -> None:
    lengths = np.full(5, LONGEST_DOCUMENT, dtype=np.int32)
    index = index_bytes(lengths, np.dtype("<i4"))
    pointers = np.frombuffer(index, "<i8", 5, HEADER.size + 20)
    assert pointers.tolist() == [number * LONGEST_DOCUMENT * 4 for number in range(5)]
