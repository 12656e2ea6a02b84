"""Documents on their way, partitioned by a hash of their text: the first of the two passes of the global shuffle.

A document's bucket follows from its text alone, so equal texts meet in one bucket, where all but the first are dropped,
and a bucket is a random sample of the corpus. Each bucket becomes one shard; its documents are ordered there by a
seeded hash. Nothing ever holds more than one bucket, or one run of a read task, in memory. Of more than `MOST_AT_ONCE`
buckets the first pass only reaches groups (regroup.py).

A spool is one file of frames, one for each run and place, and an index, int64 [frames, 5]: place, offset, bytes,
documents, XXH3 of the frame. It isn't compressed: that would cost a fifth of the time that encoding takes. Few buckets
get small runs, which stay in the processor's cache from parsing to writing; many get long ones, so that frames stay
worth a disk's seek. Frames are mapped, and a text is copied out only when it is asked for.
"""

import hashlib
import math
import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash
from blake3 import blake3

from megatron_joy.data.atomic import atomic_file
from megatron_joy.errors import WorkError

SMALLEST_RUN, LARGEST_RUN = 2_000_000, 64_000_000  # text that a read task gathers before it writes a run
FRAME_BYTES = 250_000  # what a run should have for each bucket, within these bounds
MOST_AT_ONCE = LARGEST_RUN // FRAME_BYTES  # buckets that documents can be put into in one pass with frames of this size
HASH_BYTES = 16
HEADER = struct.Struct("<16sIQIHHHI")  # hash, input, offset, part; bytes of licence, URL, language, text
LONGEST_LICENCE, LONGEST_URL = 255, 4096  # bytes
SPLITS = ("train", "validation")
SPLIT_SCALE = 2**32


@dataclass(slots=True)
class Spooled:
    """A document with the first 16 bytes of its text's BLAKE3 and where it is from. view: its text in UTF-8."""

    hash: bytes
    input: int
    offset: int
    licence: str | None
    view: bytes | memoryview
    url: str | None = None
    language: str | None = None
    part: int = 0

    @property
    def text(self) -> bytes:
        """The text in UTF-8; a copy where it lies in a mapped spool."""
        return bytes(self.view)

    @property
    def size(self) -> int:
        """Bytes of text."""
        return len(self.view)


@dataclass(frozen=True)
class Buckets:
    """How documents are divided: buckets 0 .. train - 1 are the training set's, the rest the validation set's."""

    train: int
    validation: int
    validation_share: float

    @property
    def total(self) -> int:
        """All buckets of both splits."""
        return self.train + self.validation

    @property
    def in_group(self) -> int:
        """Buckets of a group. Where documents can't be put into all buckets at once they are put into groups first."""
        return 1 if self.total <= MOST_AT_ONCE else math.isqrt(self.total - 1) + 1

    @property
    def groups(self) -> int:
        """Groups of both splits; as many as there are buckets where one pass is enough."""
        return self._train_groups + -(-self.validation // self.in_group)

    @property
    def _train_groups(self) -> int:
        return -(-self.train // self.in_group)

    def group_of(self, bucket: int) -> int:
        """The group of a bucket; no group has buckets of both splits."""
        if bucket < self.train:
            return bucket // self.in_group
        return self._train_groups + (bucket - self.train) // self.in_group

    def group_of_text(self, text_hash: bytes) -> int:
        """The group of a text by its hash."""
        return self.group_of(self.bucket_of(text_hash))

    def split_of_group(self, group: int) -> str:
        """The split of a group's buckets."""
        return SPLITS[0] if group < self._train_groups else SPLITS[1]

    def split_of(self, bucket: int) -> tuple[str, int]:
        """The split of a bucket and its number there."""
        return (SPLITS[0], bucket) if bucket < self.train else (SPLITS[1], bucket - self.train)

    def split_of_text(self, text_hash: bytes) -> str:
        """The split of a text by its hash."""
        return SPLITS[int.from_bytes(text_hash[8:12], "little") < self.validation_share * SPLIT_SCALE]

    def bucket_of(self, text_hash: bytes) -> int:
        """The bucket of a text by its hash. Independent bits choose the split, the bucket and (later) the order."""
        place, part = struct.unpack_from("<QI", text_hash)
        if part < self.validation_share * SPLIT_SCALE:
            return self.train + int(place % self.validation)
        return int(place % self.train)

    def buckets_of(self, text_hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """`bucket_of` for many hashes, uint8 [n, HASH_BYTES]: [n]."""
        place = text_hashes[:, :8].copy().view("<u8")[:, 0]
        part = text_hashes[:, 8:12].copy().view("<u4")[:, 0]
        train, validation = place % np.uint64(self.train), place % np.uint64(max(1, self.validation))
        chosen = np.where(part < self.validation_share * SPLIT_SCALE, validation + np.uint64(self.train), train)
        return chosen.astype(np.int64)


def divide(text_bytes: int, validation_share: float, shard_bytes: int) -> Buckets:
    """Buckets of about `shard_bytes` of text each; at least one for training, and one for validation if wanted."""
    train = max(1, round(text_bytes * (1 - validation_share) / shard_bytes))
    validation = max(1, round(text_bytes * validation_share / shard_bytes)) if validation_share else 0
    return Buckets(train, validation, validation_share)


def text_hash(text: bytes) -> bytes:
    """The first 16 bytes of the BLAKE3 of a text."""
    return blake3(text).digest(length=HASH_BYTES)


def frame_checksum(frame: bytes | memoryview) -> int:
    """XXH3 of a frame in 63 bits."""
    return int(xxhash.xxh3_64_intdigest(frame) >> 1)


class SpoolWriter:
    """Writes one task's documents into `spool.bin` and `spool.npy`'s rows; bounded in memory.

    place_of: the bucket, or group, of a text's hash; places: how many of them this task meets.
    """

    def __init__(self, stream: BinaryIO, place_of: Callable[[bytes], int], places: int) -> None:
        self._stream = stream
        self._place_of = place_of
        self._run = min(LARGEST_RUN, max(SMALLEST_RUN, places * FRAME_BYTES))
        self._gathered: dict[int, list[bytes | memoryview]] = {}
        self._size = 0
        self._offset = 0
        self._rows: list[tuple[int, int, int, int, int]] = []

    def add(self, document: Spooled) -> None:
        """Put a document into its place."""
        licence = (document.licence or "").encode()[:LONGEST_LICENCE]
        url = (document.url or "").encode()[:LONGEST_URL]
        language = (document.language or "").encode()
        sizes = (len(licence), len(url), len(language), document.size)
        header = HEADER.pack(document.hash, document.input, document.offset, document.part, *sizes)
        parts = (header + licence + url + language, document.view)
        self._gathered.setdefault(self._place_of(document.hash), []).extend(parts)
        self._size += document.size
        if self._size >= self._run:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered as one run, place by place."""
        for place, parts in sorted(self._gathered.items()):
            frame = b"".join(parts)
            self._stream.write(frame)
            self._rows.append((place, self._offset, len(frame), len(parts) // 2, frame_checksum(frame)))
            self._offset += len(frame)
        self._gathered.clear()
        self._size = 0

    def index(self) -> npt.NDArray[np.int64]:
        """The frames written so far: int64 [frames, 5]."""
        return np.array(self._rows, dtype=np.int64).reshape(-1, 5)


def spool_paths(folder: Path) -> tuple[Path, Path]:
    """The data and the index of the spool in a folder."""
    return folder / "spool.bin", folder / "spool.npy"


def write_index(path: Path, index: npt.NDArray[np.int64]) -> None:
    """Write an index, of a spool or another file, atomically."""
    with atomic_file(path) as stream:
        np.save(stream, index, allow_pickle=False)


def _stated(content: memoryview) -> str | None:
    return (bytes(content).decode("utf-8", "ignore") or None) if content else None


def _parse(content: memoryview) -> Iterator[Spooled]:
    place = 0
    while place < len(content):
        digest, file, offset, part, licence_bytes, url_bytes, language_bytes, text_bytes = HEADER.unpack_from(
            content, place
        )
        url_start = place + HEADER.size + licence_bytes
        language_start = url_start + url_bytes
        text_start = language_start + language_bytes
        licence = _stated(content[place + HEADER.size : url_start])
        url = _stated(content[url_start:language_start])
        language = _stated(content[language_start:text_start])
        place = text_start + text_bytes
        yield Spooled(digest, file, offset, licence, content[text_start:place], url, language, part)


def _read_frames(folder: Path, wanted: int | None) -> Iterator[Spooled]:
    """The documents of one spool, of one place (a bucket, or a group of them) or all, in the order of its frames.

    Raises WorkError when the spool is damaged or holds another number of documents than its index says.
    """
    data, index = spool_paths(folder)
    rows = np.load(index, allow_pickle=False)
    chosen = rows if wanted is None else rows[rows[:, 0] == wanted]
    if not len(chosen):
        return
    with open(data, "rb") as stream:
        whole = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    for _, offset, size, documents, checksum in chosen.tolist():
        content = whole[offset : offset + size]
        if len(content) != size or frame_checksum(content) != checksum:
            raise WorkError(f"{data}: damaged at byte {offset} (its checksum differs); remove it and run again")
        found = 0
        for document in _parse(content):
            found += 1
            yield document
        if found != documents:
            raise WorkError(f"{data}: {found} documents at byte {offset}, its index says {documents}")


def read_bucket(folders: list[Path], bucket: int) -> Iterator[Spooled]:
    """A bucket's (or group's) documents over all spools, in the order of the inputs; texts stay in the mapped files.

    Raises WorkError as `_read_frames`.
    """
    for folder in folders:
        yield from _read_frames(folder, bucket)


def read_all(folder: Path) -> Iterator[Spooled]:
    """Every document of one read task: run by run, in a run bucket by bucket. Raises WorkError as `_read_frames`."""
    yield from _read_frames(folder, None)


def unique(documents: Iterator[Spooled], on_copy: Callable[[Spooled], None] = lambda copy: None) -> Iterator[Spooled]:
    """The first of each text; `on_copy` gets the others."""
    seen: set[bytes] = set()
    for document in documents:
        if document.hash in seen:
            on_copy(document)
        else:
            seen.add(document.hash)
            yield document


def shuffled(documents: list[Spooled], seed: int) -> list[Spooled]:
    """A bucket's documents in the order of a seeded hash of their texts: independent of how they arrived."""
    key = hashlib.sha256(f"order of documents, seed {seed}".encode()).digest()
    return sorted(documents, key=lambda document: hashlib.blake2b(document.hash, key=key, digest_size=16).digest())
