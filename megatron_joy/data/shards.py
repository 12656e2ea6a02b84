"""One shard: plain Megatron `.bin/.idx`, so that Megatron-core reads ours and we read its.

`.idx`, little-endian: the magic `MMIDIDX\\0\\0`, version u64 = 1, dtype code u8, sequence count u64, document count u64
(documents + 1), lengths i32[sequences], pointers i64[sequences] in bytes, document indices i64[documents + 1] from 0.
`.bin`: the tokens, one after another, no header (megatron/core/datasets/indexed_dataset.py).

Megatron's reader checks nothing of this and its writer loops over sequences in Python; here the sizes are checked when
a shard is opened (in constant time) and the index is written by numpy.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from megatron_joy.data.atomic import commit_partial, partial_path
from megatron_joy.errors import UserError

TokenArray = npt.NDArray[np.integer[Any]]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
UINT16_VOCABULARY_LIMIT = 65_500  # Megatron's DType.optimal_dtype; there is no u32 in the format
LONGEST_DOCUMENT = 2**31 - 1  # lengths are i32


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that Megatron takes for a vocabulary: uint16 below 65,500 entries, else int32."""
    return DTYPES[8] if vocab_size < UINT16_VOCABULARY_LIMIT else DTYPES[4]


def bin_path(prefix: Path) -> Path:
    """`folder/shard_00000` -> `folder/shard_00000.bin`."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """`folder/shard_00000` -> `folder/shard_00000.idx`."""
    return prefix.with_name(prefix.name + ".idx")


@dataclass(frozen=True)
class ShardSummary:
    """What a writer knows of the shard it has just written; sizes in bytes, hashes as hexadecimal BLAKE3."""

    documents: int
    tokens: int
    bin_bytes: int
    bin_blake3: str
    idx_bytes: int
    idx_blake3: str


def index_bytes(lengths: npt.NDArray[np.int32], dtype: np.dtype[Any]) -> bytes:
    """The whole `.idx` of documents with these token counts, one sequence each.

    lengths: int32 [documents]. The same bytes as Megatron-core's IndexedDatasetBuilder writes.
    """
    documents = len(lengths)
    pointers = np.zeros(documents, dtype="<i8")
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    pointers *= dtype.itemsize
    header = HEADER.pack(MAGIC, VERSION, CODES[dtype], documents, documents + 1)
    parts = (lengths.astype("<i4", copy=False), pointers, np.arange(documents + 1, dtype="<i8"))
    return b"".join((header, *(part.data for part in parts)))


class ShardWriter:
    """Writes `prefix.bin` and `prefix.idx`; neither appears before `close`, and an error leaves nothing behind.

    Use it as a context manager: `with ShardWriter(prefix, dtype) as writer: writer.add(tokens, lengths)`, after which
    `writer.summary` holds counts and checksums. The index is the last to appear, so an `.idx` always has its `.bin`.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        if dtype not in CODES:
            raise ValueError(f"{dtype} has no code in Megatron's format; {sorted(str(known) for known in CODES)} have")
        self.prefix = prefix
        self.dtype = dtype
        self.summary: ShardSummary | None = None
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._bin_partial = partial_path(bin_path(prefix))
        self._idx_partial = partial_path(idx_path(prefix))
        self._stream = open(self._bin_partial, "wb")  # noqa: SIM115 (closed by close or abandon)
        self._hash = blake3()
        self._bytes = 0

    def add(self, tokens: TokenArray, lengths: npt.NDArray[np.integer[Any]]) -> None:
        """Append documents: tokens [sum of lengths] of any integer dtype, lengths [documents], each ending with eod.

        Raises UserError when a token does not fit the shard's dtype or a document is longer than the format allows.
        """
        if int(lengths.sum()) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens for lengths that sum to {int(lengths.sum())}")
        if len(tokens) == 0:
            return
        limits = np.iinfo(self.dtype)
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest > limits.max:
            raise UserError(f"{bin_path(self.prefix)}: token ids {lowest} to {highest} do not fit {self.dtype}")
        if int(lengths.max()) > LONGEST_DOCUMENT:
            raise UserError(
                f"{bin_path(self.prefix)}: a document of {int(lengths.max())} tokens; Megatron's index holds at most "
                f"{LONGEST_DOCUMENT}; split it"
            )
        # Of the same width and in range: the same bytes, no copy.
        same = tokens.dtype.kind in "iu" and tokens.dtype.itemsize == self.dtype.itemsize
        own = tokens.view(self.dtype) if same and tokens.flags.c_contiguous else tokens.astype(self.dtype, order="C")
        data = own.data.cast("B")
        self._stream.write(data)
        self._hash.update(data)
        self._bytes += len(data)
        self._lengths.append(lengths.astype(np.int32))

    def close(self) -> ShardSummary:
        """Write the index, sync both files and let them appear. Returns counts and checksums."""
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, dtype=np.int32)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        index = index_bytes(lengths, self.dtype)
        with open(self._idx_partial, "wb") as stream:
            stream.write(index)
            stream.flush()
            os.fsync(stream.fileno())
        commit_partial(self._bin_partial, bin_path(self.prefix))
        commit_partial(self._idx_partial, idx_path(self.prefix))
        self.summary = ShardSummary(
            documents=len(lengths),
            tokens=self._bytes // self.dtype.itemsize,
            bin_bytes=self._bytes,
            bin_blake3=self._hash.hexdigest(),
            idx_bytes=len(index),
            idx_blake3=blake3(index).hexdigest(),
        )
        return self.summary

    def abandon(self) -> None:
        """Drop what was written so far."""
        self._stream.close()
        self._bin_partial.unlink(missing_ok=True)
        self._idx_partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.summary is None:
                self.close()
        finally:
            self.abandon()


def _map_file(path: Path) -> tuple[mmap.mmap | bytes, int]:
    """The file's bytes, mapped and read-only, and its size; an empty file cannot be mapped and gives b""."""
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            return (mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) if size else b""), size
    except FileNotFoundError:
        raise UserError(f"{path}: not there; a shard needs both its .bin and its .idx") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; expected a file of a shard") from None


class ShardReader:
    """A shard, mapped: opening costs the same for any size, and reads only what is asked for.

    Attributes (arrays are read-only views of the files):
        dtype: of the tokens.
        tokens: [token count], the documents one after another.
        lengths: int32 [sequences], tokens of each sequence.
        pointers: int64 [sequences], first byte of each sequence.
        document_indices: int64 [documents + 1], first sequence of each document (ours have one sequence each).

    Raises UserError, with one line, when a file is missing, is not such an index, or has a size that disagrees with it.
    What only a full read can show (a flipped byte, a wrong pointer in the middle) is `verify.py`'s.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        index_file = idx_path(self.prefix)
        index, size = _map_file(index_file)
        sequences, documents = self._read_header(index, size)
        offset = HEADER.size
        self.lengths = np.frombuffer(index, "<i4", sequences, offset)
        self.pointers = np.frombuffer(index, "<i8", sequences, offset + 4 * sequences)
        self.document_indices = np.frombuffer(index, "<i8", documents + 1, offset + 12 * sequences)
        token_file = bin_path(self.prefix)
        data, found = _map_file(token_file)
        expected = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if found != expected:
            raise UserError(
                f"{token_file}: {found} bytes, expected {expected} by its index; "
                f"{'the file is cut short' if found < expected else 'the two do not belong together'}: write it again"
            )
        self.tokens: TokenArray = np.frombuffer(data, self.dtype)

    def _read_header(self, index: mmap.mmap | bytes, size: int) -> tuple[int, int]:
        """Check the index's header and size; returns the counts of sequences and documents."""
        path = idx_path(self.prefix)
        if size < HEADER.size:
            raise UserError(f"{path}: {size} bytes, expected at least the header's {HEADER.size}; write it again")
        magic, version, code, sequences, document_ends = HEADER.unpack_from(index)
        if magic != MAGIC or version != VERSION or code not in DTYPES:
            raise UserError(f"{path}: not a Megatron index (magic {magic!r}, version {version}, dtype code {code})")
        expected = HEADER.size + 12 * sequences + 8 * document_ends
        if sequences and size == expected + sequences:
            raise UserError(f"{path}: has a mode for each sequence (multimodal); only text shards are read here")
        if size != expected or document_ends < 1:
            raise UserError(f"{path}: {size} bytes, expected {expected} by its own header; write it again")
        self.dtype = DTYPES[code]
        return sequences, document_ends - 1

    @property
    def documents(self) -> int:
        """How many documents the shard holds."""
        return len(self.document_indices) - 1

    def __len__(self) -> int:
        return self.documents

    def _first_token(self, document: int) -> int:
        sequence = int(self.document_indices[document])
        if sequence == len(self.pointers):
            return len(self.tokens)
        return int(self.pointers[sequence]) // self.dtype.itemsize

    def document(self, document: int) -> TokenArray:
        """The tokens [length] of one document, eod included. Raises IndexError outside 0 .. documents - 1."""
        if not 0 <= document < self.documents:
            raise IndexError(f"{self.prefix}: document {document} of {self.documents}")
        return self.tokens[self._first_token(document) : self._first_token(document + 1)]

    def document_of(self, position: int) -> int:
        """The number of the document that holds token `position`. Raises IndexError outside the shard."""
        if not 0 <= position < len(self.tokens):
            raise IndexError(f"{self.prefix}: token {position} of {len(self.tokens)}")
        sequence = int(np.searchsorted(self.pointers, position * self.dtype.itemsize, side="right")) - 1
        return int(np.searchsorted(self.document_indices, sequence, side="right")) - 1
