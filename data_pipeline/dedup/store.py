"""Signatures on disk: one folder for each part of a corpus, read through memory maps.

  part.json       how it was made (MinHash fingerprint), documents
  signatures.bin  uint32 [documents, permutations]
  documents.bin   int64 [documents, 2]: bytes of text, place of the document's shingles in shingles.bin
  scores.bin      float32 [documents]: what to prefer within a cluster, 0 where nobody said
  shingles.bin    uint64: each document's set of shingle hashes, ascending; what exact similarity is computed from

A document has a row in its part and a number over all parts in their order. Shingles take about 1.3 bytes for a byte of
text; with them a part is all that later runs need to tell new documents from old ones.
"""

import struct
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from data_pipeline.dedup.minhash import Hashes, MinHash, Numbers, Signatures
from megatron_joy.data.atomic import atomic_file, write_atomically
from megatron_joy.errors import UserError

PART = "part.json"
FILES = ("signatures.bin", "documents.bin", "scores.bin", "shingles.bin")
ENTRY, SCORE = struct.Struct("<qq"), struct.Struct("<f")


def write_part(folder: Path, method: MinHash, documents: Iterable[tuple[bytes, float]]) -> list[Path]:
    """Sign documents (UTF-8 text, score) and write them as a part, atomically; returns its files."""
    paths = [folder / name for name in FILES]
    count = place = 0
    with ExitStack() as stack:
        signed, sizes, scores, sets = [stack.enter_context(atomic_file(path)) for path in paths]
        for text, score in documents:
            hashes = method.shingles(text)
            signed.write(method.signature_of(hashes).tobytes())
            sizes.write(ENTRY.pack(len(text), place))
            scores.write(SCORE.pack(score))
            sets.write(hashes.data)
            place += len(hashes)
            count += 1
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
    """One part, read through memory maps. existing: published by an earlier run; such documents are never dropped."""

    folder: Path
    documents: int
    permutations: int
    existing: bool

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
    def sizes(self) -> Numbers:
        """Bytes of text [documents]."""
        return self._map("documents.bin", "<i8").reshape(-1, 2)[:, 0]  # type: ignore[return-value]

    @cached_property
    def starts(self) -> Numbers:
        """Where each document's set starts in `shingles`, and where the last ends [documents + 1]."""
        starts = self._map("documents.bin", "<i8").reshape(-1, 2)[:, 1]
        return np.append(starts, len(self.shingles)).astype(np.int64)

    @cached_property
    def scores(self) -> npt.NDArray[np.float32]:
        """What to prefer within a cluster [documents]."""
        return self._map("scores.bin", "<f4")  # type: ignore[return-value]


def open_part(folder: Path, method: MinHash, existing: bool = False) -> Part:
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
    return Part(folder, documents, permutations, existing)


@dataclass(frozen=True)
class Store:
    """Several parts as one: documents are numbered over all of them in their order."""

    parts: Sequence[Part]

    @cached_property
    def offsets(self) -> Numbers:
        """Number of each part's first document, and of all documents at the end [parts + 1]."""
        return np.cumsum([0, *(part.documents for part in self.parts)]).astype(np.int64)

    def _owners(self, numbers: Numbers) -> Numbers:
        return np.searchsorted(self.offsets, numbers, side="right") - 1

    def signatures(self, numbers: Numbers) -> Signatures:
        """Signatures [n, permutations] of these documents."""
        found = np.empty((len(numbers), self.parts[0].permutations), dtype=np.uint32)
        owners = self._owners(numbers)
        for owner in np.unique(owners).tolist():
            own = owners == owner
            found[own] = self.parts[owner].signatures[numbers[own] - self.offsets[owner]]
        return found

    def column(self, name: str, numbers: Numbers) -> npt.NDArray[np.float64]:
        """A number of each of these documents [n]: sizes (bytes of text), scores, existing (1 or 0)."""
        found = np.empty(len(numbers), dtype=np.float64)
        owners = self._owners(numbers)
        for owner in np.unique(owners).tolist():
            own, part = owners == owner, self.parts[owner]
            values = part.existing if name == "existing" else getattr(part, name)[numbers[own] - self.offsets[owner]]
            found[own] = values
        return found

    def set_sizes(self, numbers: Numbers) -> Numbers:
        """How many different shingles these documents have [n]."""
        found = np.empty(len(numbers), dtype=np.int64)
        owners = self._owners(numbers)
        for owner in np.unique(owners).tolist():
            own, part = owners == owner, self.parts[owner]
            rows = numbers[own] - self.offsets[owner]
            found[own] = part.starts[rows + 1] - part.starts[rows]
        return found

    def sets(self, numbers: Numbers) -> tuple[Hashes, Numbers]:
        """The shingle sets of these documents, one after another, and where each starts [n + 1]."""
        parts = []
        for number, owner in zip(numbers.tolist(), self._owners(numbers).tolist(), strict=True):
            part, row = self.parts[owner], number - int(self.offsets[owner])
            parts.append(part.shingles[part.starts[row] : part.starts[row + 1]])
        starts = np.cumsum([0, *map(len, parts)]).astype(np.int64)
        return np.concatenate([np.zeros(0, np.uint64), *parts]), starts
