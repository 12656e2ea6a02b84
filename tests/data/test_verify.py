"""verify finds every kind of damage, names the file, what was found and what was expected, and says all at once."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_joy.data.checksum import file_blake3
from megatron_joy.data.manifest import (
    Accounts,
    Manifest,
    ShardEntry,
    TokenizerIdentity,
    Totals,
    load_manifest,
    write_manifest,
)
from megatron_joy.data.provenance import SUFFIX, DocumentOrigin, read_origins, write_origins
from megatron_joy.data.shards import HEADER, ShardWriter
from megatron_joy.data.verify import shard_sets, verify
from megatron_joy.errors import UserError

EOD = 0
TOKENIZER = b'{"version": "1.0"}'


def make_set(folder: Path, documents: list[list[int]] | None = None, vocab_size: int = 100) -> Path:
    """A small shard set of two shards."""
    documents = documents or [[5, 6, EOD], [7, EOD], [8, 9, 10, EOD], [11, EOD]]
    entries = []
    for number, part in enumerate((documents[:3], documents[3:])):
        prefix = folder / f"shard_{number:05d}"
        with ShardWriter(prefix, np.dtype("<u2")) as writer:
            writer.add(np.concatenate(part), np.array([len(document) for document in part]))
        assert writer.summary is not None
        provenance = prefix.with_name(prefix.name + SUFFIX)
        digest = write_origins(provenance, [DocumentOrigin("a", "f.txt", 0, "MIT", "ab", 9)] * len(part))
        entries.append(
            ShardEntry(name=prefix.name, provenance=provenance.name, provenance_blake3=digest, **vars(writer.summary))
        )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_bytes(TOKENIZER)
    count, tokens = len(documents), sum(map(len, documents))
    write_manifest(
        folder,
        Manifest(
            source="tiny",
            split="train",
            tokenizer=TokenizerIdentity(
                sha256=hashlib.sha256(TOKENIZER).hexdigest(), vocab_size=vocab_size, eod_id=EOD, eod_token="<eod>"
            ),
            dtype="uint16",
            totals=Totals(documents=count, tokens=tokens, bytes_text=9 * count),
            accounts=Accounts(documents_in=count, documents_out=count, dropped={}),
            shards=entries,
        ),
    )
    return folder


def flip(path: Path, place: int, by: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= by
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def problems_of(folder: Path) -> list[str]:
    return [str(problem) for problem in verify(folder).problems]


def test_a_whole_set_has_no_problems(tmp_path: Path) -> None:
    result = verify(make_set(tmp_path), threads=2)
    assert result.problems == []
    assert (result.shards, result.documents, result.tokens) == (2, 4, 11)


@pytest.mark.parametrize("name", ["shard_00000.bin", "shard_00001.idx", "shard_00001.documents.jsonl.zst"])
@pytest.mark.parametrize("damage", [cut, lambda path: flip(path, -1), lambda path: flip(path, 0), Path.unlink])
def test_any_damaged_file_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(make_set(tmp_path) / name)
    problems = problems_of(tmp_path)
    assert problems
    assert all(problem.startswith(f"{tmp_path / name}: ") for problem in problems)
    assert all(": found " in problem and ", expected " in problem for problem in problems)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_no_flipped_bit_of_any_file_goes_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = make_set(tmp_path_factory.mktemp("set"))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    path = data.draw(st.sampled_from(files))
    flip(path, data.draw(st.integers(0, path.stat().st_size - 1)), 1 << data.draw(st.integers(0, 7)))
    assert any(str(path) in problem for problem in problems_of(folder))


def test_the_wrong_tokenizer_is_named(tmp_path: Path) -> None:
    path = make_set(tmp_path) / "tokenizer" / "tokenizer.json"
    path.write_bytes(b"{}")
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(f"{path}: SHA-256: found ")


def test_every_problem_is_reported_not_the_first(tmp_path: Path) -> None:
    make_set(tmp_path)
    cut(tmp_path / "shard_00000.bin")
    flip(tmp_path / "shard_00001.bin", 0)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    named = {problem.partition(": ")[0] for problem in problems_of(tmp_path)}
    assert named == {
        str(tmp_path / name) for name in ("shard_00000.bin", "shard_00001.bin", "tokenizer/tokenizer.json")
    }


def believed(folder: Path) -> None:
    """Make the manifest's checksums those of the files, so that only the content can be wrong."""
    manifest = load_manifest(folder)
    entries = []
    for entry in manifest.shards:
        digests = {f"{kind}_blake3": file_blake3(folder / f"{entry.name}.{kind}") for kind in ("bin", "idx")}
        entries.append(entry.model_copy(update=digests))
    write_manifest(folder, manifest.model_copy(update={"shards": entries}))


# Offsets in the index of three sequences: lengths, then pointers, then four document indices.
LENGTHS, POINTERS, INDICES = HEADER.size, HEADER.size + 12, HEADER.size + 36


@pytest.mark.parametrize(
    ("name", "place", "by", "says"),
    [
        ("shard_00000.bin", 0, 0x80, "token 0: found id 133, expected below vocab_size 100"),
        ("shard_00000.bin", 4, 1, "last token of document 0: found id 1 (1 documents so), expected eod 0"),
        ("shard_00000.bin", 2, 6, "end-of-document ids: found 4, expected 3"),
        ("shard_00000.idx", POINTERS + 8, 2, "pointer of sequence 1: found 4, expected 6"),
        ("shard_00000.idx", INDICES + 8, 3, "document index 1: found 2, expected 1"),
        ("shard_00000.idx", LENGTHS, 2, "pointer of sequence 1: found 6, expected 2"),
    ],
)
def test_content_that_checksums_cannot_know_is_checked(
    tmp_path: Path, name: str, place: int, by: int, says: str
) -> None:
    make_set(tmp_path)
    flip(tmp_path / name, place, by)
    believed(tmp_path)
    assert any(problem.startswith(f"{tmp_path / name}: {says}") for problem in problems_of(tmp_path)), problems_of(
        tmp_path
    )


def test_a_shard_that_the_manifest_does_not_know_is_named(tmp_path: Path) -> None:
    make_set(tmp_path)
    (tmp_path / "shard_00007.bin").write_bytes(b"")
    assert [problem.partition(": ")[0] for problem in problems_of(tmp_path)] == [str(tmp_path / "shard_00007.bin")]


def test_both_splits_of_an_output_folder_are_found(tmp_path: Path) -> None:
    make_set(tmp_path / "train")
    assert shard_sets(tmp_path) == [tmp_path / "train"]
    make_set(tmp_path / "validation")
    assert shard_sets(tmp_path) == [tmp_path / "train", tmp_path / "validation"]
    assert shard_sets(tmp_path / "train") == [tmp_path / "train"]
    with pytest.raises(UserError, match=r"no manifest\.json here"):
        shard_sets(tmp_path / "train" / "tokenizer")


def test_origins_come_back_and_a_torn_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / f"shard{SUFFIX}"
    origins = [DocumentOrigin("a", f"{number}.txt", number, None, "ab", 3) for number in range(1000)]
    write_origins(path, origins)
    assert list(read_origins(path)) == origins
    content = path.read_bytes()
    for length in (1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="torn"):
            list(read_origins(path))
