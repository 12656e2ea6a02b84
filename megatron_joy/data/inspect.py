"""What a shard set holds, for people: its accounts, its sources, one document as text and tokens with its origin."""

from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_joy.data.manifest import TOKENIZER_FOLDER, Manifest, ShardEntry, load_manifest, manifest_path
from megatron_joy.data.provenance import DocumentOrigin, read_origins
from megatron_joy.data.shards import ShardReader
from megatron_joy.errors import UserError


@dataclass(frozen=True)
class SetReport:
    """A shard set in numbers. dropped: documents by reason; sources: documents, tokens and bytes_text of each."""

    folder: str
    split: str
    shards: int
    dtype: str
    vocab_size: int
    documents_in: int
    dropped: dict[str, int]
    documents: int
    tokens: int
    bytes_text: int
    median_tokens: int
    longest_tokens: int
    unigram_entropy: float | None
    sources: dict[str, dict[str, int]]


def _lengths(folder: Path, manifest: Manifest) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    return [ShardReader(folder / entry.name).lengths for entry in manifest.shards]


def report_set(folder: Path | str) -> SetReport:
    """The numbers of a shard set; reads the manifest and the indexes. Raises UserError as they do."""
    folder = manifest_path(folder).parent
    manifest = load_manifest(folder)
    lengths = np.concatenate([np.zeros(0, dtype=np.int32), *_lengths(folder, manifest)])
    return SetReport(
        folder=str(folder),
        split=manifest.split,
        shards=len(manifest.shards),
        dtype=manifest.dtype,
        vocab_size=manifest.tokenizer.vocab_size,
        documents_in=manifest.accounts.documents_in,
        dropped=manifest.accounts.dropped,
        documents=manifest.totals.documents,
        tokens=manifest.totals.tokens,
        bytes_text=manifest.totals.bytes_text,
        median_tokens=int(np.median(lengths)) if len(lengths) else 0,
        longest_tokens=int(lengths.max()) if len(lengths) else 0,
        unigram_entropy=manifest.unigram_entropy,
        sources={name: totals.model_dump() for name, totals in manifest.sources.items()},
    )


def _locate(manifest: Manifest, number: int, folder: Path) -> tuple[int, int]:
    """The shard that holds a document of the set, and the document's number there."""
    ends = list(accumulate(entry.documents for entry in manifest.shards))
    if not 0 <= number < manifest.totals.documents:
        raise UserError(f"--doc {number}: {folder} has documents 0 to {manifest.totals.documents - 1}")
    shard = int(np.searchsorted(ends, number, side="right"))
    return shard, number - (ends[shard - 1] if shard else 0)


def _scores(folder: Path, manifest: Manifest, entry: ShardEntry, document: int) -> dict[str, float | None] | None:
    """A document's scores by column, None for one that it has not; None where documents have no scores."""
    if entry.scores is None:
        return None
    try:
        row = np.load(folder / entry.scores, mmap_mode="r", allow_pickle=False)[document]
        values = [float(value) for value in row]
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{folder / entry.scores}: cannot be read ({error}); see `joy data verify {folder}`") from None
    known = [None if np.isnan(value) else value for value in values]
    return dict(zip(manifest.score_columns, known, strict=True))


def document_report(folder: Path | str, number: int) -> dict[str, Any]:
    """Document `number` of a set (from 0): shard, document (its number there), origin, scores, text, tokens; JSON.

    Raises UserError when there is no such document, or the shard or the tokenizer cannot be read.
    """
    from tokenizers import Tokenizer

    folder = manifest_path(folder).parent
    manifest = load_manifest(folder)
    shard, document = _locate(manifest, number, folder)
    entry = manifest.shards[shard]
    tokens = ShardReader(folder / entry.name).document(document).tolist()
    path = folder / TOKENIZER_FOLDER / "tokenizer.json"
    try:
        text = Tokenizer.from_file(str(path)).decode(tokens, skip_special_tokens=False)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: the tokenizers library cannot load it ({error})") from None
    origin: DocumentOrigin | None = None
    if entry.provenance is not None:
        origin = next(islice(read_origins(folder / entry.provenance), document, None), None)
    return {
        "shard": entry.name,
        "document": document,
        "origin": None if origin is None else asdict(origin),
        "scores": _scores(folder, manifest, entry, document),
        "text": text,
        "tokens": tokens,
    }
