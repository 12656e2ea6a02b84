"""A source: the shards of one manifest as one long text of tokens, cut into samples that are read when asked for.

A sample is s tokens and one more, s being the sequence length: neighbours share one token, which is the last label of
one and the first input of the next. `cut` says where sample i begins; with one length that is i * s. What is left after
the last whole sample (or block of samples) is not read. Opening reads the manifest only; each shard's files are opened
when first touched, and few at a time.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_joy.data.cut import block_of, shares
from megatron_joy.data.manifest import Manifest, ShardEntry, load_manifest, manifest_path
from megatron_joy.data.provenance import DocumentOrigin, read_origins
from megatron_joy.data.shards import ShardReader, bin_path, idx_path
from megatron_joy.errors import UserError

OPEN_FILES = 128  # per source; a training process has 1,024 descriptors by default
STAT_THREADS = 16  # a shared file system answers in milliseconds, but many at once


@dataclass(frozen=True)
class DocumentPiece:
    """A document's part of a sample.

    tokens: [first, last) in the sample; document_tokens: [first, last) in the document, eod counted; origin: where the
    document is from, None where the shard has no provenance file.
    """

    shard: str
    document: int
    tokens: tuple[int, int]
    document_tokens: tuple[int, int]
    origin: DocumentOrigin | None


def source_fingerprint(manifest: Manifest) -> str:
    """SHA-256 of what determines the source's text of tokens: its name, tokenizer, dtype and shards, in order.

    Where the folder lies and when or by which code it was written does not matter.
    """
    digest = hashlib.sha256(f"{manifest.source}\n{manifest.tokenizer.sha256}\n{manifest.dtype}\n".encode())
    for entry in manifest.shards:
        digest.update(f"{entry.tokens} {entry.bin_blake3}\n".encode())
    return digest.hexdigest()


class TokenFiles:
    """Reads ranges of `.bin` files, keeping the most recently used ones open. Safe to use from several threads.

    Reads with pread, not through a map: a file that shrinks while it is read is then an error line, not a SIGBUS, and
    pages of other samples do not count as this process's memory.
    """

    def __init__(self, limit: int = OPEN_FILES) -> None:
        self._limit = limit
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, size: int, offset: int, length: int) -> bytes:
        """`length` bytes at `offset` of a file that must have `size` bytes. Raises UserError where it has not."""
        with self._lock:
            data = os.pread(self._descriptor(path, size), length, offset)
        if len(data) != length:
            raise UserError(
                f"{path}: nothing at byte {offset + len(data)}, expected {size} bytes; it was cut while it was read"
            )
        return data

    def _descriptor(self, path: Path, size: int) -> int:
        descriptor = self._open.pop(path, None)
        if descriptor is None:
            check_size(path, size)
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[path] = descriptor
        if len(self._open) > self._limit:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        """Closes every file; a later read opens them again."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()


def check_size(path: Path, expected: int) -> None:
    """Raises UserError when the file is missing or does not have the size that the manifest says."""
    try:
        found = os.stat(path).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the manifest beside it names it") from None
    if found != expected:
        raise UserError(
            f"{path}: {found} bytes, expected {expected} by the manifest; "
            f"{'it is cut short' if found < expected else 'it is too long'}: copy or write this shard again"
        )


class Source:
    """One manifest's samples of `sequence_length` tokens and one more.

    Attributes: folder; manifest; name (the manifest's); fingerprint (of its tokens); tokens; samples (of one epoch).
    planned: tokens that the run reads at each of its sequence lengths, by which the text is shared out (`data.cut`);
    none: the whole text is for this one. Raises UserError as `load_manifest`, and when the source has not the tokens of
    one sample.
    """

    def __init__(
        self,
        folder: Path | str,
        sequence_length: int,
        seed: int = 0,
        planned: Mapping[int, Fraction] | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        self.manifest = manifest or load_manifest(folder)
        self.folder = manifest_path(folder).parent
        self.name, self.fingerprint = self.manifest.source, source_fingerprint(self.manifest)
        self.sequence_length = sequence_length
        # First token of each shard and, last, the count of tokens: int64 [shards + 1].
        self._starts = np.zeros(len(self.manifest.shards) + 1, dtype=np.int64)
        np.cumsum([entry.tokens for entry in self.manifest.shards], out=self._starts[1:])
        self.tokens = int(self._starts[-1])
        planned = planned or {sequence_length: Fraction(1)}
        found = shares(self.tokens, planned, seed, self.fingerprint)
        if found is None:
            raise UserError(
                f"{manifest_path(folder)}: {self.tokens} tokens, expected at least "
                f"{len(planned) * block_of(list(planned)) + 1} for one sample of data.sequence_length = "
                f"{' and one of '.join(map(str, sorted(planned)))}; add documents or shorten the sequence"
            )
        self._share = found[sequence_length]
        self.samples = self._share.samples
        self._files = TokenFiles()

    def token_offset(self, index: int) -> int:
        """Where in the source's text of tokens a sample begins. Raises IndexError outside 0 .. samples - 1."""
        if not 0 <= index < self.samples:
            raise IndexError(f"{self.name}: sample {index} of {self.samples}")
        return self._share.offset(index)

    def sample(self, index: int) -> npt.NDArray[np.int64]:
        """The tokens of a sample, int64 [sequence_length + 1].

        Raises UserError when a shard is missing, has another size than its manifest says, or holds an id outside the
        vocabulary (what other damage there may be only `joy data verify` finds, which reads everything).
        """
        first = self.token_offset(index)
        parts = [
            self._read(entry, begin, end) for entry, begin, end in self._spans(first, first + self.sequence_length + 1)
        ]
        return np.concatenate(parts)

    def _spans(self, first: int, last: int) -> list[tuple[ShardEntry, int, int]]:
        """Tokens [first, last) of the text as (shard, begin, end) in each shard that has some of them."""
        spans = []
        shard = int(np.searchsorted(self._starts, first, side="right")) - 1
        while first < last:
            start, stop = int(self._starts[shard]), int(self._starts[shard + 1])
            if first < stop:
                spans.append((self.manifest.shards[shard], first - start, min(last, stop) - start))
            first, shard = max(first, stop), shard + 1
        return spans

    def _read(self, entry: ShardEntry, begin: int, end: int) -> npt.NDArray[np.int64]:
        path, dtype = bin_path(self.folder / entry.name), self.manifest.numpy_dtype
        data = self._files.read(path, entry.bin_bytes, begin * dtype.itemsize, (end - begin) * dtype.itemsize)
        tokens = np.frombuffer(data, dtype).astype(np.int64)
        limit = self.manifest.tokenizer.vocab_size
        if (wrong := np.flatnonzero((tokens < 0) | (tokens >= limit))).size:
            raise UserError(
                f"{path}: token {begin + int(wrong[0])} is {int(tokens[wrong[0]])}, outside the vocabulary of {limit}; "
                f"the shard is damaged: see `joy data verify {self.folder}`"
            )
        return tokens

    def documents(self, index: int) -> list[DocumentPiece]:
        """The documents that a sample's tokens are of, in order; opens only the shards that it touches."""
        first = self.token_offset(index)
        pieces: list[DocumentPiece] = []
        done = 0
        for entry, begin, end in self._spans(first, first + self.sequence_length + 1):
            pieces += self._pieces(entry, begin, end, done)
            done += end - begin
        return pieces

    def _pieces(self, entry: ShardEntry, begin: int, end: int, done: int) -> list[DocumentPiece]:
        """The documents of tokens [begin, end) of a shard, which are the sample's from token `done` on."""
        check_size(idx_path(self.folder / entry.name), entry.idx_bytes)
        shard = ShardReader(self.folder / entry.name)
        first, last = shard.document_of(begin), shard.document_of(end - 1)
        start = int(shard.pointers[int(shard.document_indices[first])]) // shard.dtype.itemsize
        pieces = []
        for document, origin in zip(range(first, last + 1), self._origins(entry, first, last + 1), strict=True):
            stop = start + len(shard.document(document))
            a, b = max(begin, start), min(end, stop)
            pieces.append(
                DocumentPiece(
                    shard=entry.name,
                    document=document,
                    tokens=(done + a - begin, done + b - begin),
                    document_tokens=(a - start, b - start),
                    origin=origin,
                )
            )
            start = stop
        return pieces

    def _origins(self, entry: ShardEntry, first: int, last: int) -> list[DocumentOrigin | None]:
        """Origins of documents [first, last) of a shard; None for each where the shard has no provenance."""
        if entry.provenance is None:
            return [None] * (last - first)
        path = self.folder / entry.provenance
        origins: list[DocumentOrigin | None] = list(islice(read_origins(path), first, last))
        if len(origins) != last - first:
            raise UserError(
                f"{path}: {first + len(origins)} documents, expected {entry.documents} by the manifest; "
                "write the set again"
            )
        return origins

    def longest_document(self, enough: int) -> int:
        """Tokens of the longest document; stops at the first one of at least `enough` tokens, eod not counted."""
        longest = 0
        for entry in self.manifest.shards:
            shard = ShardReader(self.folder / entry.name)
            if len(shard.document_indices) > 1:
                sums = np.concatenate([[0], np.cumsum(shard.lengths, dtype=np.int64)])[shard.document_indices]
                longest = max(longest, int(np.diff(sums).max()) - 1)
            if longest >= enough:
                break
        return longest

    def check_sizes(self) -> None:
        """Holds the size of every file against the manifest; a second or so for 40,000 shards on a local disk.

        Raises UserError that names the first shard file that is wrong.
        """
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            wrong = [number for number in pool.map(self._first_wrong, range(STAT_THREADS)) if number is not None]
        if wrong:
            entry = self.manifest.shards[min(wrong)]
            check_size(bin_path(self.folder / entry.name), entry.bin_bytes)
            check_size(idx_path(self.folder / entry.name), entry.idx_bytes)

    def _first_wrong(self, worker: int) -> int | None:
        """The first shard of a worker's share that has a file of another size, or none at all."""
        for number in range(worker, len(self.manifest.shards), STAT_THREADS):
            entry = self.manifest.shards[number]
            prefix = f"{self.folder}/{entry.name}"
            try:
                sizes = os.stat(f"{prefix}.bin").st_size, os.stat(f"{prefix}.idx").st_size
            except OSError:
                return number
            if sizes != (entry.bin_bytes, entry.idx_bytes):
                return number
        return None

    def close(self) -> None:
        """Closes open shards."""
        self._files.close()
