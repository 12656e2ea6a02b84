"""Signatures on disk: one folder for each part of a corpus, read through memory maps.

  part.json       how it was made (MinHash fingerprint), documents
  signatures.bin  uint32 [documents, permutations]
  documents.bin   int64 [documents, 2]: bytes of text, place of the document's shingles in shingles.bin
  scores.bin      float32 [documents]: what to prefer within a cluster, 0 where nobody said
  shingles.bin    uint64: each document's set of shingle hashes, ascending; what exact similarity is computed from

A document has a row in its part and a number over all parts in their order. Shingles take about 1.3 bytes for a byte of
text; with them a part is all that later runs need to tell new documents from old ones.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from data_pipeline.dedup.minhash import Hashes, MinHash, Numbers, Signatures
from megatron_joy.data.atomic import atomic_file, write_atomically
from megatron_joy.errors import UserError

PART = "part.json"
FILES = ("signatures.bin", "documents.bin", "scores.bin", "shingles.bin")
OPEN_PARTS = 1000
BATCH_BYTES = 1_000_000  # text that is signed at a time


def _batches(documents: Iterable[tuple[bytes, float]]) -> Iterator[tuple[list[bytes], list[float]]]:
    """Documents, about `BATCH_BYTES` of text at a time."""
    texts: list[bytes] = []
    scores: list[float] = []
    size = 0
    for text, score in documents:
        texts.append(text)
        scores.append(score)
        size += len(text)
        if size >= BATCH_BYTES:
            yield texts, scores
            texts, scores, size = [], [], 0
    if texts:
        yield texts, scores


def write_part(folder: Path, method: MinHash, documents: Iterable[tuple[bytes, float]]) -> list[Path]:
    """Sign documents (UTF-8 text, score) and write them as a part, atomically; returns its files."""
    paths = [folder / name for name in FILES]
    count = place = 0
    with ExitStack() as stack:
        streams = [stack.enter_context(atomic_file(path)) for path in paths]
        for texts, scores in _batches(documents):
            signatures, sets, ends = method.sign(texts)
            begins = place + np.concatenate([[0], ends[:-1]])
            entries = np.stack([np.fromiter(map(len, texts), np.int64, len(texts)), begins], axis=1)
            for stream, rows in zip(streams, (signatures, entries, np.array(scores, "<f4"), sets), strict=True):
                stream.write(np.ascontiguousarray(rows).data)
            place += len(sets)
            count += len(texts)
    content = {
        "fingerprint": method.fingerprint,
        "permutations": method.permutations,
        "documents": count,
        "shingles": place,
    }
    write_atomically(folder / PART, orjson.dumps(content))
    return [*paths, folder / PART]


@dataclass(frozen=True)
class Part:
    """One part, read through memory maps."""

    folder: Path
    documents: int
    permutations: int

    def _map(self, name: str, dtype: str) -> npt.NDArray[np.generic]:
        path = self.folder / name
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)

    @cached_property
    def signatures(self) -> Signatures:
        """uint32 [documents, permutations]."""
        return self._map("signatures.bin", "<u4").reshape(self.documents, self.permutations)  # type: ignore[return-value]

    @cached_property
    def shingles(self) -> Hashes:
        """All documents' sets, one after another."""
        return self._map("shingles.bin", "<u8")  # type: ignore[return-value]

    @cached_property
    def _entries(self) -> Numbers:
        return self._map("documents.bin", "<i8").reshape(-1, 2)  # type: ignore[return-value]

    @property
    def sizes(self) -> Numbers:
        """Bytes of text [documents]."""
        return self._entries[:, 0]

    def bounds(self, rows: Numbers) -> tuple[Numbers, Numbers]:
        """Where these documents' sets start in `shingles`, and where they end [n] each."""
        starts, after = self._entries[:, 1], rows + 1
        inside = after < self.documents
        stops = np.full(len(rows), len(self.shingles), dtype=np.int64)
        stops[inside] = starts[after[inside]]
        return starts[rows], stops

    def set_sizes(self, rows: Numbers) -> Numbers:
        """How many different shingles these documents have [n]."""
        starts, stops = self.bounds(rows)
        return stops - starts

    @cached_property
    def scores(self) -> npt.NDArray[np.float32]:
        """What to prefer within a cluster [documents]."""
        return self._map("scores.bin", "<f4")  # type: ignore[return-value]


def open_part(folder: Path, method: MinHash) -> Part:
    """Open a part. Raises UserError when it is missing, torn, or was made by another method."""
    try:
        content = orjson.loads((folder / PART).read_bytes())
        documents, permutations = content["documents"], content["permutations"]
        sizes = {name: (folder / name).stat().st_size for name in FILES}
    except (OSError, orjson.JSONDecodeError, KeyError) as error:
        raise UserError(f"{folder}: no whole signature part ({error}); give a folder that a run has finished") from None
    if content["fingerprint"] != method.fingerprint:
        raise UserError(
            f"{folder / PART}: made with other shingles, permutations or Unicode tables "
            f"({content['fingerprint'][:12]}, expected {method.fingerprint[:12]}); sign those documents again"
        )
    for name, row in (("signatures.bin", 4 * permutations), ("documents.bin", 16), ("scores.bin", 4)):
        if sizes[name] != documents * row:
            raise UserError(f"{folder / name}: {sizes[name]} bytes, expected {documents * row}; sign them again")
    return Part(folder, documents, permutations)


class Store:
    """Several parts as one: documents are numbered over all of them in their order.

    `part` opens a part when it is asked for and keeps at most `OPEN_PARTS` open: a process may map so many files only,
    and a corpus may have more. `parts` opens one after another and keeps none.
    """

    def __init__(self, folders: Sequence[Path], method: MinHash, earlier: int, offsets: Numbers | None = None) -> None:
        """Args:
        folders: of the parts.
        method: that they must have been made with.
        earlier: how many of them, the first ones, are of earlier runs: their documents exist and are never dropped.
        offsets: what `offsets` of a store of the same parts was; None: every part is opened once to know.
        """
        self._folders, self._method = folders, method
        self.part = lru_cache(OPEN_PARTS)(lambda number: open_part(folders[number], method))
        counts = (part.documents for part in self.parts()) if offsets is None else ()
        # Number of each part's first document, and of all documents at the end [parts + 1].
        self.offsets = np.cumsum([0, *counts]).astype(np.int64) if offsets is None else offsets
        self.existing = int(self.offsets[earlier])  # documents with a smaller number exist

    def parts(self) -> Iterator[Part]:
        """All parts in their order; what of one was read is let go with it."""
        return (open_part(folder, self._method) for folder in self._folders)

    def _by_owner(self, numbers: Numbers) -> Iterator[tuple[npt.NDArray[np.bool_], Part, Numbers]]:
        """(which of these documents, their part, their rows in it)."""
        owners = np.searchsorted(self.offsets, numbers, side="right") - 1
        for owner in np.unique(owners).tolist():
            own = owners == owner
            yield own, self.part(owner), numbers[own] - self.offsets[owner]

    def signatures(self, numbers: Numbers) -> Signatures:
        """Signatures [n, permutations] of these documents."""
        found = np.empty((len(numbers), self._method.permutations), dtype=np.uint32)
        for own, part, rows in self._by_owner(numbers):
            found[own] = part.signatures[rows]
        return found

    def column(self, name: str, numbers: Numbers) -> npt.NDArray[np.float64]:
        """A number of each of these documents [n]: sizes (bytes of text) or scores."""
        found = np.empty(len(numbers), dtype=np.float64)
        for own, part, rows in self._by_owner(numbers):
            found[own] = getattr(part, name)[rows]
        return found

    def set_sizes(self, numbers: Numbers) -> Numbers:
        """How many different shingles these documents have [n]."""
        found = np.empty(len(numbers), dtype=np.int64)
        for own, part, rows in self._by_owner(numbers):
            found[own] = part.set_sizes(rows)
        return found

    def sets(self, numbers: Numbers) -> tuple[Hashes, Numbers]:
        """The shingle sets of these documents, ascending numbers, one after another, and where each starts [n + 1]."""
        found = [np.zeros(0, np.uint64)]
        for _, part, rows in self._by_owner(numbers):
            starts, stops = part.bounds(rows)
            found += [part.shingles[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
        starts = np.cumsum([0, *map(len, found[1:])]).astype(np.int64)
        return np.concatenate(found), starts
