"""A source gives the same samples as slicing all its tokens at once, and refuses damaged shards with one line."""

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_joy.data.manifest import load_manifest
from megatron_joy.data.source import Source, TokenFiles, source_fingerprint
from megatron_joy.errors import UserError

from .tiny_shards import decode, encode, some_texts, write_shard_set


@pytest.mark.parametrize("length", [1, 7, 16, 500])
def test_samples_are_slices_of_all_shards_put_together(tmp_path: Path, length: int) -> None:
    text = write_shard_set(tmp_path, some_texts(7, 9))
    source = Source(tmp_path, length)
    assert source.tokens == len(text)
    assert source.samples == (len(text) - 1) // length
    for index in range(source.samples):
        expected = text[index * length : index * length + length + 1]
        found = source.sample(index)
        assert found.dtype == np.int64 and np.array_equal(found, expected)
    for outside in (-1, source.samples):
        with pytest.raises(IndexError):
            source.sample(outside)


def test_empty_shards_between_others_are_stepped_over(tmp_path: Path) -> None:
    texts = [[], ["one", "two"], [], [], ["three", "four"], []]
    text = write_shard_set(tmp_path, texts)
    source = Source(tmp_path, 5)
    assert np.array_equal(source.sample(1), text[5:11])
    assert [(piece.shard, piece.document) for piece in source.documents(1)] == [
        ("shard_00001", 1),
        ("shard_00004", 0),
    ]


def test_documents_of_a_sample_lead_back_to_the_text(tmp_path: Path) -> None:
    texts = some_texts(4, 5)
    write_shard_set(tmp_path, texts)
    corpus = (tmp_path / "corpus.txt").read_bytes()
    source = Source(tmp_path, 33)
    for index in range(source.samples):
        sample, covered = source.sample(index), 0
        for piece in source.documents(index):
            first, last = piece.tokens
            assert first == covered < last
            covered = last
            assert piece.origin is not None and piece.origin.licence == "CC0"
            document = encode(corpus[piece.origin.offset :][: piece.origin.bytes_text].decode())
            assert decode(document[:-1]) == texts[int(piece.shard[-5:])][piece.document]
            assert np.array_equal(document[slice(*piece.document_tokens)], sample[first:last])
        assert covered == 34


def test_the_last_partial_sample_is_left_out_and_one_exact_sample_is_enough(tmp_path: Path) -> None:
    text = write_shard_set(tmp_path, [["abcdefgh"]])  # 9 tokens
    assert Source(tmp_path, 8).samples == 1
    assert Source(tmp_path, 7).samples == 1
    assert np.array_equal(Source(tmp_path, 8).sample(0), text)
    with pytest.raises(UserError, match=r"manifest\.json: 9 tokens, expected at least 10 for one sample of data\.sequ"):
        Source(tmp_path, 9)


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    write_shard_set(tmp_path, [[]])
    with pytest.raises(UserError, match="0 tokens, expected at least 9"):
        Source(tmp_path, 8)


@pytest.mark.parametrize(("change", "says"), [(-1, "it is cut short"), (1, "it is too long")])
def test_a_shard_of_another_size_is_refused_at_first_touch(tmp_path: Path, change: int, says: str) -> None:
    write_shard_set(tmp_path, some_texts(3, 30))
    path = tmp_path / "shard_00001.bin"
    size = path.stat().st_size
    os.truncate(path, size + change)
    source = Source(tmp_path, 16)
    source.sample(0)
    inside = int(load_manifest(tmp_path).shards[0].tokens) // 16 + 1
    with pytest.raises(UserError, match=rf"shard_00001\.bin: {size + change} bytes, expected {size} .*{says}"):
        source.sample(inside)
    with pytest.raises(UserError, match=r"shard_00001\.bin"):
        source.check_sizes()


def test_check_sizes_finds_missing_and_cut_files(tmp_path: Path) -> None:
    write_shard_set(tmp_path, some_texts(3, 4))
    source = Source(tmp_path, 16)
    source.check_sizes()
    os.truncate(tmp_path / "shard_00002.idx", 40)
    with pytest.raises(UserError, match=r"shard_00002\.idx: 40 bytes, expected"):
        source.check_sizes()
    (tmp_path / "shard_00000.bin").unlink()
    with pytest.raises(UserError, match=r"shard_00000\.bin: cannot be read \(No such file"):
        source.check_sizes()


def test_a_file_cut_while_it_is_open_is_an_error_line(tmp_path: Path) -> None:
    write_shard_set(tmp_path, some_texts(1, 30))
    source = Source(tmp_path, 16)
    source.sample(0)
    os.truncate(tmp_path / "shard_00000.bin", 100)
    with pytest.raises(UserError, match=r"nothing at byte \d+, expected \d+ bytes; it was cut while it"):
        source.sample(source.samples - 1)


def test_an_id_outside_the_vocabulary_is_refused_with_its_place(tmp_path: Path) -> None:
    write_shard_set(tmp_path, some_texts(2, 30))
    path = tmp_path / "shard_00000.bin"
    raw = bytearray(path.read_bytes())
    raw[2 * 5 + 1] ^= 0x80  # the high byte of token 5
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"shard_00000\.bin: token 5 is \d+, outside the vocabulary of 257.*verify"):
        Source(tmp_path, 16).sample(0)


def test_few_files_are_open_at_a_time_and_all_are_closed(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    paths = [tmp_path / str(number) for number in range(30)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number] * 10))
    before, files = descriptors(), TokenFiles(limit=4)
    for _ in range(2):
        for number, path in enumerate(paths):
            assert files.read(path, 10, 3, 4) == bytes([number] * 4)
            assert descriptors() <= before + 4
    files.close()
    assert descriptors() == before
    assert files.read(paths[0], 10, 0, 1) == b"\0"
    files.close()


def test_the_fingerprint_is_of_the_tokens_not_of_the_place(tmp_path: Path) -> None:
    texts = some_texts(3, 4)
    for name in ("here", "there"):
        write_shard_set(tmp_path / name, texts)
    write_shard_set(tmp_path / "other", [*texts[:2], [*texts[2][:3], "!"]])
    write_shard_set(tmp_path / "swapped", texts[::-1])
    prints = {
        name: source_fingerprint(load_manifest(tmp_path / name)) for name in ("here", "there", "other", "swapped")
    }
    assert prints["here"] == prints["there"]
    assert len(set(prints.values())) == 3
