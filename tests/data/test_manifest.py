"""A manifest is read strictly, never leads out of its folder, and closes its accounts."""

import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from megatron_joy.data.manifest import (
    Accounts,
    FileName,
    Manifest,
    ShardEntry,
    TokenizerIdentity,
    Totals,
    load_manifest,
    write_manifest,
)
from megatron_joy.errors import UserError

HASH = "0" * 64


def entry(name: str, documents: int = 2, tokens: int = 10) -> ShardEntry:
    return ShardEntry(
        name=name,
        documents=documents,
        tokens=tokens,
        bin_bytes=2 * tokens,
        bin_blake3=HASH,
        idx_bytes=100,
        idx_blake3=HASH,
        provenance=f"{name}.documents.jsonl.zst",
        provenance_blake3=HASH,
    )


def manifest(shards: int = 3) -> Manifest:
    return Manifest(
        source="tiny",
        split="train",
        tokenizer=TokenizerIdentity(sha256=HASH, vocab_size=100, eod_id=0, eod_token="<eod>"),
        dtype="uint16",
        totals=Totals(documents=2 * shards, tokens=10 * shards, bytes_text=50),
        accounts=Accounts(documents_in=2 * shards + 3, documents_out=2 * shards, dropped={"empty": 1, "not_utf8": 2}),
        shards=[entry(f"shard_{number:05d}") for number in range(shards)],
    )


def edited(folder: Path, *path: str | int, value: Any) -> None:
    """Change one value of the manifest on disk."""
    file = write_manifest(folder, manifest())
    content = node = orjson.loads(file.read_bytes())
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    file.write_bytes(orjson.dumps(content))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, manifest())
    assert load_manifest(tmp_path) == load_manifest(path) == manifest()


def test_the_same_manifest_has_the_same_bytes(tmp_path: Path) -> None:
    first = write_manifest(tmp_path / "a", manifest()).read_bytes()
    assert write_manifest(tmp_path / "b", manifest()).read_bytes() == first


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("shards", 1, "name"), "../../etc/passwd", "shards.1.name"),
        (("shards", 1, "name"), "/etc/passwd", "shards.1.name"),
        (("shards", 1, "name"), ".hidden", "shards.1.name"),
        (("shards", 1, "name"), "a\n", "shards.1.name"),
        (("shards", 1, "provenance"), "../x", "shards.1.provenance"),
        (("shards", 1, "name"), "shard_00000", "two have the name shard_00000"),
        (("shards", 1, "tokens"), 11, "totals.tokens: 30, but the shards sum to 31"),
        (("shards", 1, "documents"), -1, "shards.1.documents"),
        (("shards", 1, "bin_blake3"), "abc", "shards.1.bin_blake3"),
        (("totals", "documents"), 7, "totals.documents: 7, but the shards sum to 6"),
        (("accounts", "dropped", "empty"), 2, "off by -1"),
        (("accounts", "documents_in"), 10, "off by 1"),
        (("tokenizer", "eod_id"), 100, "expected below vocab_size 100"),
        (("format_version",), 2, "format_version"),
        (("dtype",), "uint32", "dtype"),
        (("totals", "tokens"), "30", "totals.tokens"),
        (("sourc",), "x", "sourc"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(tmp_path: Path, path: tuple[Any, ...], value: Any, says: str) -> None:
    edited(tmp_path, *path, value=value)
    with pytest.raises(UserError) as error:
        load_manifest(tmp_path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    edited(tmp_path, "shards", value=[{"name": "../a"}, {"name": "b"}])
    with pytest.raises(UserError) as error:
        load_manifest(tmp_path)
    for key in ("shards.0.name", "shards.0.tokens", "shards.1.bin_blake3"):
        assert key in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_something_else_is_refused_with_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: "):
        load_manifest(tmp_path)


def test_a_folder_without_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/manifest\.json: not there"):
        load_manifest(tmp_path / "nowhere")


def test_accounts_off_by_one_are_never_written(tmp_path: Path) -> None:
    wrong = manifest().model_copy(update={"accounts": Accounts(documents_in=8, documents_out=6, dropped={"empty": 1})})
    with pytest.raises(ValueError, match="off by 1"):
        write_manifest(tmp_path, wrong)
    assert list(tmp_path.iterdir()) == []


def test_forty_thousand_shards_load_in_seconds(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest(40_000))
    began = time.process_time()
    assert len(load_manifest(tmp_path).shards) == 40_000
    assert time.process_time() - began < 3


def test_file_names_are_plain() -> None:
    from pydantic import TypeAdapter

    names = TypeAdapter(FileName)
    assert names.validate_python("shard_00000.documents.jsonl.zst") == "shard_00000.documents.jsonl.zst"
    for name in ("", ".", "..", "a/b", "a\\b", "a b", "a\0", "-rf"):
        with pytest.raises(ValidationError):
            names.validate_python(name)
