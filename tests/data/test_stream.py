"""Sample k depends on the recipe and k alone; every sample of an epoch is read once; bad blends are refused."""

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_joy.data.stream import SampleStream, open_streams
from megatron_joy.errors import UserError
from megatron_joy.recipe.schema import DataSection, Recipe

from .tiny_shards import recipe_table, some_texts, write_shard_set

LENGTH = 16


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Two shard sets: folder -> all of its tokens."""
    return {
        str(tmp_path / "a"): write_shard_set(tmp_path / "a", some_texts(5, 20, seed=1), source="a"),
        str(tmp_path / "b"): write_shard_set(tmp_path / "b", some_texts(3, 10, seed=2), source="b"),
    }


def data_section(folders: dict[str, Any], weights: tuple[float, ...] = (0.75, 0.25), **keys: Any) -> DataSection:
    entries = [{"manifest": folder, "weight": weight} for folder, weight in zip(folders, weights, strict=True)]
    return DataSection.model_validate({"sequence_length": LENGTH, "train": entries, **keys})


def test_samples_agree_with_a_plain_reference(folders: dict[str, Any]) -> None:
    stream = SampleStream(data_section(folders), 7, "train")
    texts = dict(zip("ab", folders.values(), strict=True))
    for k in range(300):
        sample = stream.sample(k)
        start = sample.index * LENGTH
        assert sample.token_offset == start and sample.eod == 0
        assert np.array_equal(sample.tokens, texts[sample.source][start : start + LENGTH + 1])
        assert stream.sample_number(sample.source, sample.epoch, sample.index) == k


def test_every_sample_of_an_epoch_is_read_exactly_once(folders: dict[str, Any]) -> None:
    stream = SampleStream(data_section(folders), 7, "train")
    read = Counter((p.source, p.epoch, p.index) for p in map(stream.place, range(1000)))
    assert set(read.values()) == {1}
    for name, source in stream.sources.items():
        whole = int(stream.epochs(1000)[name])
        assert whole >= 2
        for epoch in range(whole):
            assert {i for n, e, i in read if (n, e) == (name, epoch)} == set(range(source.samples))


def test_sources_come_in_the_proportion_of_their_weights(folders: dict[str, Any]) -> None:
    stream = SampleStream(data_section(folders), 7, "train")
    assert stream.sources_in(range(4000, 8000)) == {"a": 3000, "b": 1000}
    assert stream.sources_in(range(5, 5)) == {"a": 0, "b": 0}
    assert stream.sources_in(range(3, 90)) == Counter(stream.place(k).source for k in range(3, 90))


def test_another_process_with_the_folder_elsewhere_reads_the_same(folders: dict[str, Any], tmp_path: Path) -> None:
    here = SampleStream(data_section(folders), 7, "train")
    program = (
        "import sys, hashlib; from megatron_joy.data.stream import *; from megatron_joy.recipe.schema import *;"
        f"d = DataSection(sequence_length={LENGTH}, train=[SourceEntry(manifest='a', weight=.75),"
        "SourceEntry(manifest='b/manifest.json', weight=.25)]); s = SampleStream(d, 7, 'train');"
        "print(s.fingerprint(), hashlib.sha256(b''.join(s.sample(k).tokens.tobytes() for k in range(99))).hexdigest());"
        "assert 'torch' not in sys.modules"
    )
    output = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{Path(__file__).parents[2]}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    content = hashlib.sha256(b"".join(here.sample(k).tokens.tobytes() for k in range(99))).hexdigest()
    assert output.split() == [here.fingerprint(), content]


def test_the_fingerprint_changes_with_whatever_changes_samples(folders: dict[str, Any]) -> None:
    streams = [
        SampleStream(data_section(folders), 7, "train"),
        SampleStream(data_section(folders), 8, "train"),
        SampleStream(data_section(folders, (0.5, 0.5)), 7, "train"),
        SampleStream(data_section(folders, sequence_length=LENGTH + 1), 7, "train"),
        SampleStream(data_section(dict(reversed(folders.items()))), 7, "train"),
        SampleStream(data_section(dict([*folders.items()][:1]), (1.0,)), 7, "train"),
    ]
    assert len({stream.fingerprint() for stream in streams}) == len(streams)
    # Weights that mean the same shares are the same blend.
    assert SampleStream(data_section(folders, (3.0, 1.0)), 7, "train").fingerprint() == streams[0].fingerprint()


def test_the_same_shards_under_two_entries_are_refused(folders: dict[str, Any]) -> None:
    first = next(iter(folders))
    twice = {"sequence_length": LENGTH, "train": [{"manifest": first}, {"manifest": f"{first}/manifest.json"}]}
    with pytest.raises(UserError, match=r"data\.train: .*/a and .*/a/manifest\.json hold the same shards"):
        SampleStream(DataSection.model_validate(twice), 7, "train")


def test_sources_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_shard_set(tmp_path / str(seed), some_texts(1, 20, seed=seed), source="same")
    stream = SampleStream(data_section({str(tmp_path / "1"): 0, str(tmp_path / "2"): 0}, (1.0, 1.0)), 7, "train")
    assert list(stream.sources) == [f"same ({tmp_path / '1'})", f"same ({tmp_path / '2'})"]


def test_a_split_without_sources_and_a_missing_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.validation: no source"):
        SampleStream(DataSection(sequence_length=4), 7, "validation")
    with pytest.raises(UserError, match=r"nowhere/manifest\.json: not there"):
        SampleStream(data_section({str(tmp_path / "nowhere"): 0}, (1.0,)), 7, "train")


def test_shards_of_another_tokenizer_are_refused_by_name(folders: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "c"
    write_shard_set(other, some_texts(1, 20), tokenizer="1" * 64)
    with pytest.raises(UserError, match=r"/c: made with tokenizer 111111111111, expected [0-9a-f]{12} of .*/a;"):
        SampleStream(data_section({**folders, str(other): 0}, (1.0, 1.0, 1.0)), 7, "train")
    write_shard_set(other, some_texts(1, 20), eod=5)
    with pytest.raises(UserError, match=r"/c: documents end with id 5, expected 0 as in .*/a"):
        SampleStream(data_section({**folders, str(other): 0}, (1.0, 1.0, 1.0)), 7, "train")


def test_the_recipes_tokenizer_must_be_the_shards(folders: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer: .*tokenizer\.json cannot be read"):
        SampleStream(data_section(folders, tokenizer=str(tmp_path / "tok")), 7, "train")
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_bytes(b"other")
    with pytest.raises(UserError, match=r"/a: made with tokenizer .* of .*tok/tokenizer\.json"):
        SampleStream(data_section(folders, tokenizer=str(tmp_path / "tok")), 7, "train")
    (tmp_path / "tok" / "tokenizer.json").write_bytes(b"bytes")
    SampleStream(data_section(folders, tokenizer=str(tmp_path / "tok")), 7, "train")


def test_training_and_validation_share_tokenizer_and_vocabulary(folders: dict[str, Any], tmp_path: Path) -> None:
    train, validation = folders
    table = recipe_table([{"manifest": train}])
    assert open_streams(Recipe.model_validate(table))[1] is None
    table["data"]["validation"] = [{"manifest": validation}]
    streams = open_streams(Recipe.model_validate(table))
    assert streams[1] is not None and list(streams[1].sources) == ["b"]
    table["model"]["vocab_size"] = 256
    with pytest.raises(UserError, match=r"model\.vocab_size: 256, expected at least 257, the tokenizer's in .*/a;"):
        open_streams(Recipe.model_validate(table))
    table["model"]["vocab_size"] = 257
    write_shard_set(tmp_path / "c", some_texts(1, 20), tokenizer="1" * 64)
    table["data"]["validation"] = [{"manifest": str(tmp_path / "c")}]
    with pytest.raises(UserError, match=r"data\.validation: .*/c has tokenizer 1{12}, expected .* as .*/a of data\.tr"):
        open_streams(Recipe.model_validate(table))
