"""Check a shard set: every count, checksum, size, pointer and token. Reports all that is wrong, not the first.

What a manifest and an index say about the files is taken on trust by every reader; this is where it is tested.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_joy.data.checksum import file_blake3, file_sha256
from megatron_joy.data.manifest import (
    MANIFEST_NAME,
    SCORES_SUFFIX,
    TOKENIZER_FOLDER,
    Manifest,
    ShardEntry,
    load_manifest,
    manifest_path,
)
from megatron_joy.data.provenance import read_origins
from megatron_joy.data.shards import ShardReader, bin_path, idx_path
from megatron_joy.errors import UserError

Digest = Callable[[Path], str]
BLOCK = 1 << 18  # tokens looked at together: a block stays in the processor's cache
SHARD_ENDINGS = (".bin", ".idx", ".documents.jsonl.zst", SCORES_SUFFIX)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the file, what was looked at, what was found, what was expected."""

    file: str
    check: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.file}: {self.check}: found {self.found}, expected {self.expected}"


@dataclass(frozen=True)
class Verification:
    """The outcome for one shard set."""

    folder: str
    shards: int
    documents: int
    tokens: int
    bytes_read: int
    problems: list[Problem]


def shard_sets(folder: Path) -> list[Path]:
    """The shard sets that a folder is or holds: itself, or its `train` and `validation`.

    Raises UserError when there is none.
    """
    if manifest_path(folder).is_file():
        return [manifest_path(folder).parent]
    found = [folder / split for split in ("train", "validation") if manifest_path(folder / split).is_file()]
    if not found:
        raise UserError(
            f"{folder}: no {MANIFEST_NAME} here nor in train/ or validation/; "
            "give a folder that `joy data run` has finished"
        )
    return found


def _check_file(
    path: Path, size: int | None, expected: str | None, kind: str = "BLAKE3", digest_of: Digest = file_blake3
) -> Iterator[Problem]:
    """Presence, size and checksum of one file."""
    if not path.is_file():
        yield Problem(str(path), "file", "nothing", "a file")
        return
    found = path.stat().st_size
    if size is not None and found != size:
        yield Problem(str(path), "size", f"{found} bytes", f"{size} by the manifest")
    digest = digest_of(path) if expected is not None else None
    if digest != expected:
        yield Problem(str(path), kind, str(digest), f"{expected} by the manifest")


def _check_index(reader: ShardReader, path: str) -> Iterator[Problem]:
    """Every length, pointer and document index."""
    if len(reader.lengths) and int(reader.lengths.min()) < 1:
        first = int(np.argmax(reader.lengths < 1))
        yield Problem(path, f"length of sequence {first}", str(reader.lengths[first]), "1 or more")
    expected = np.zeros(len(reader.lengths), dtype=np.int64)
    np.cumsum(reader.lengths[:-1], dtype=np.int64, out=expected[1:])
    expected *= reader.dtype.itemsize
    wrong = np.flatnonzero(reader.pointers != expected)
    if len(wrong):
        first = int(wrong[0])
        yield Problem(path, f"pointer of sequence {first}", str(reader.pointers[first]), str(expected[first]))
    wrong = np.flatnonzero(reader.document_indices != np.arange(reader.documents + 1))
    if len(wrong):
        first = int(wrong[0])
        yield Problem(path, f"document index {first}", str(reader.document_indices[first]), str(first))
    if reader.documents != len(reader.lengths):
        yield Problem(path, "documents", str(reader.documents), f"{len(reader.lengths)}, one for each sequence")


def _check_tokens(reader: ShardReader, manifest: Manifest, path: str) -> Iterator[Problem]:
    """Ids inside the vocabulary; the end-of-document id at the end of each document and nowhere else."""
    vocab_size, eod = manifest.tokenizer.vocab_size, manifest.tokenizer.eod_id
    ends = 0
    for start in range(0, len(reader.tokens), BLOCK):
        block = reader.tokens[start : start + BLOCK]
        if int(block.max()) >= vocab_size or int(block.min()) < 0:
            first = int(np.argmax((block >= vocab_size) | (block < 0)))
            yield Problem(path, f"token {start + first}", f"id {block[first]}", f"below vocab_size {vocab_size}")
        ends += int(np.count_nonzero(block == eod))
    # Read past a wrong length would be an IndexError here and is reported as such by the index check.
    last = np.cumsum(reader.lengths, dtype=np.int64) - 1
    inside = last[(last >= 0) & (last < len(reader.tokens))]
    missing = np.flatnonzero(reader.tokens[inside] != eod)
    if len(missing):
        position = int(inside[missing[0]])
        found = f"id {reader.tokens[position]} ({len(missing)} documents so)"
        yield Problem(path, f"last token of document {missing[0]}", found, f"eod {eod}")
    elif ends != len(reader.lengths):
        yield Problem(path, "end-of-document ids", str(ends), f"{len(reader.lengths)}, one for each document")


def _check_provenance(folder: Path, entry: ShardEntry) -> Iterator[Problem]:
    if entry.provenance is None:
        return
    path = folder / entry.provenance
    yield from _check_file(path, None, entry.provenance_blake3)
    if path.is_file():
        try:
            count = sum(1 for _ in read_origins(path))
        except UserError as error:
            yield Problem(str(path), "content", str(error), "one origin for each document")
            return
        if count != entry.documents:
            yield Problem(str(path), "documents", str(count), f"{entry.documents} by the manifest")


def _check_scores(folder: Path, manifest: Manifest, entry: ShardEntry) -> Iterator[Problem]:
    if entry.scores is None:
        return
    path = folder / entry.scores
    yield from _check_file(path, None, entry.scores_blake3)
    if not path.is_file():
        return
    expected = (entry.documents, len(manifest.score_columns))
    try:
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    except ValueError as error:
        yield Problem(str(path), "content", str(error), f"numbers {list(expected)}")
        return
    if shape != expected:
        yield Problem(str(path), "documents, columns", str(list(shape)), f"{list(expected)} by the manifest")


def check_shard(folder: Path, manifest: Manifest, entry: ShardEntry) -> list[Problem]:
    """All that is wrong with one shard."""
    prefix = folder / entry.name
    index, data = idx_path(prefix), bin_path(prefix)
    problems = [
        *_check_file(data, entry.bin_bytes, entry.bin_blake3),
        *_check_file(index, entry.idx_bytes, entry.idx_blake3),
        *_check_provenance(folder, entry),
        *_check_scores(folder, manifest, entry),
    ]
    try:
        reader = ShardReader(prefix)
    except UserError as error:
        if not problems:
            problems.append(Problem(str(index), "opening", str(error), "an index and its tokens"))
        return problems
    if reader.dtype != manifest.numpy_dtype:
        problems.append(Problem(str(index), "dtype", str(reader.dtype), f"{manifest.dtype} by the manifest"))
    for check, found, expected in (
        ("documents", reader.documents, entry.documents),
        ("tokens", len(reader.tokens), entry.tokens),
    ):
        if found != expected:
            problems.append(Problem(str(index), check, str(found), f"{expected} by the manifest"))
    return [*problems, *_check_index(reader, str(index)), *_check_tokens(reader, manifest, str(data))]


def check_tokenizer(folder: Path, manifest: Manifest) -> list[Problem]:
    """Whether the set's copy of the tokenizer is the one that its tokens are of."""
    path = folder / TOKENIZER_FOLDER / "tokenizer.json"
    return list(_check_file(path, None, manifest.tokenizer.sha256, "SHA-256", file_sha256))


def check_strays(folder: Path, manifest: Manifest) -> list[Problem]:
    """Shard files that the manifest does not know: half of another run, or a forgotten copy."""
    known = {entry.name for entry in manifest.shards}
    strays = []
    for name in sorted(os.listdir(folder)):
        ending = next((ending for ending in SHARD_ENDINGS if name.endswith(ending)), None)
        if ending and name.removesuffix(ending) not in known:
            strays.append(Problem(str(folder / name), "file", "a shard's file", "none that the manifest does not name"))
    return strays


def verify(
    folder: Path | str, threads: int = 1, on_shard: Callable[[ShardEntry], None] = lambda entry: None
) -> Verification:
    """Check one shard set. Hashing runs in `threads` threads; `on_shard` is called as each shard is done.

    Raises UserError only when the manifest itself cannot be read or contradicts itself: nothing else can be checked
    then.
    """
    folder = manifest_path(folder).parent
    manifest = load_manifest(folder)
    problems = [*check_tokenizer(folder, manifest), *check_strays(folder, manifest)]
    bytes_read = 0
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda entry: check_shard(folder, manifest, entry), manifest.shards)
        for entry, shard_problems in zip(manifest.shards, found, strict=True):
            problems += shard_problems
            bytes_read += entry.bin_bytes + entry.idx_bytes
            on_shard(entry)
    totals = manifest.totals
    return Verification(str(folder), len(manifest.shards), totals.documents, totals.tokens, bytes_read, problems)
