"""`manifest.json` of a shard set: what Megatron's format lacks (counts, checksums, tokenizer, accounts, provenance).

A shard set is a folder: `shard_00000.bin/.idx`, ..., `manifest.json`, and `tokenizer/` (a copy of the tokenizer's
files). The manifest is written last, so a folder without one is not a shard set yet.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_joy.data.atomic import write_atomically
from megatron_joy.errors import UserError

MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SCORES_SUFFIX = ".scores.npy"

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Blake3 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A plain file name: no separator, no leading dot, so that whatever a manifest says, nothing outside its folder is read.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
DtypeName = Literal["uint8", "int8", "int16", "int32", "int64", "uint16"]


class ManifestPart(BaseModel):
    """A frozen part of a manifest that refuses keys it doesn't know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TokenizerIdentity(ManifestPart):
    """Which tokenizer the ids are of."""

    sha256: Sha256 = Field(description="SHA-256 of tokenizer.json.")
    vocab_size: Annotated[int, Field(gt=0)] = Field(description="Largest token id + 1, added tokens included.")
    eod_id: Count = Field(description="The id that ends each document and stands nowhere else.")
    eod_token: str = Field(description="Its string.")


class Totals(ManifestPart):
    """Sums over all shards, or over one source's documents."""

    documents: Count
    tokens: Count = Field(description="Ids in the .bin files, one eod per document included.")
    bytes_text: Count = Field(description="UTF-8 bytes of the documents.")


class Accounts(ManifestPart):
    """documents_in = documents_out + the sum of dropped, always."""

    documents_in: Count = Field(description="Records that the readers met.")
    documents_out: Count = Field(description="Documents in this set.")
    dropped: dict[str, Count] = Field(description="How many went elsewhere, by reason (the other split is a reason).")

    @property
    def difference(self) -> int:
        """Documents that are not accounted for: 0 unless something is wrong."""
        return self.documents_in - self.documents_out - sum(self.dropped.values())


class ShardEntry(ManifestPart):
    """One shard: `name`.bin and `name`.idx."""

    name: FileName
    documents: Count
    tokens: Count
    bin_bytes: Count
    bin_blake3: Blake3
    idx_bytes: Count
    idx_blake3: Blake3
    provenance: FileName | None = Field(None, description="File that says where each document is from.")
    provenance_blake3: Blake3 | None = None
    scores: FileName | None = Field(
        None, description="File with float32 [documents, score_columns], as numpy saves it."
    )
    scores_blake3: Blake3 | None = None


class Provenance(ManifestPart):
    """How the set was made."""

    pipeline: str = Field(description="Name of the pipeline.")
    pipeline_sha256: Sha256 = Field(description="SHA-256 of the resolved pipeline.")
    code_version: str = Field(description="Version of the code that wrote the set.")


class Manifest(ManifestPart):
    """What a shard set holds."""

    format_version: Literal[1] = 1
    source: str = Field(description="Name of the set, used in blends and reports.")
    split: str = Field(description="train or validation.")
    tokenizer: TokenizerIdentity
    dtype: DtypeName
    totals: Totals
    accounts: Accounts
    sources: dict[str, Totals] = Field(default_factory=dict, description="Totals of each input source.")
    languages: dict[str, Totals] = Field(
        default_factory=dict, description="Totals of each language, where a transform identified any."
    )
    unigram_entropy: float | None = Field(
        None, description="Nats per token of the set's own token frequencies: the loss of knowing nothing else."
    )
    score_columns: list[str] = Field(default_factory=list, description="What the columns of the shards' scores are.")
    shards: list[ShardEntry]
    provenance: Provenance | None = None

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """dtype of the tokens, little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")


def manifest_path(folder: Path | str) -> Path:
    """The manifest of a shard set; also takes the manifest's own path."""
    path = Path(folder)
    return path if path.name == MANIFEST_NAME else path / MANIFEST_NAME


def describe_problems(error: ValidationError) -> str:
    """All of a validation's problems in one line, each with its key, joined by semicolons."""
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg']}" for problem in error.errors()
    )


def repeated_names(names: Iterable[str]) -> list[str]:
    """Names that occur more than once, in order of their repetition."""
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]


def load_manifest(folder: Path | str) -> Manifest:
    """Read and check the manifest of a shard set; milliseconds for tens of thousands of shards.

    Raises UserError, with one line, when there is none, when it is not JSON or not of this schema (all problems named),
    when two shards have one name, or when shards and totals or the accounts disagree.
    """
    path = manifest_path(folder)
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: not there; expected a folder of shards with its manifest, as `joy data run` writes it"
        ) from None
    try:
        manifest = Manifest.model_validate(orjson.loads(content))
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); write the shard set again") from None
    except ValidationError as error:
        raise UserError(f"{path}: {describe_problems(error)}") from None
    problems = inconsistencies(manifest)
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    return manifest


def inconsistencies(manifest: Manifest) -> list[str]:
    """What a manifest says that cannot be true together, one line each."""
    problems = [f"shards: two have the name {name}" for name in repeated_names(e.name for e in manifest.shards)]
    for quantity in ("documents", "tokens"):
        total, found = getattr(manifest.totals, quantity), sum(getattr(entry, quantity) for entry in manifest.shards)
        if total != found:
            problems.append(f"totals.{quantity}: {total}, but the shards sum to {found}")
    if manifest.accounts.difference:
        problems.append(
            f"accounts: {manifest.accounts.documents_in} documents in, {manifest.accounts.documents_out} out and "
            f"{sum(manifest.accounts.dropped.values())} dropped: off by {manifest.accounts.difference}"
        )
    if manifest.accounts.documents_out != manifest.totals.documents:
        problems.append(
            f"accounts.documents_out: {manifest.accounts.documents_out}, expected {manifest.totals.documents}"
        )
    if manifest.tokenizer.eod_id >= manifest.tokenizer.vocab_size:
        problems.append(
            f"tokenizer.eod_id: {manifest.tokenizer.eod_id}, expected below vocab_size {manifest.tokenizer.vocab_size}"
        )
    return problems


def write_manifest(folder: Path | str, manifest: Manifest) -> Path:
    """Write `manifest.json` into the folder, atomically. Raises ValueError for one that contradicts itself."""
    problems = inconsistencies(manifest)
    if problems:
        raise ValueError("; ".join(problems))
    path = manifest_path(folder)
    write_atomically(path, orjson.dumps(manifest.model_dump(), option=orjson.OPT_INDENT_2) + b"\n")
    return path
