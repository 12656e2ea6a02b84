"""`ledger.json` of a pipeline's output: what became of every document and byte, step by step, for each source.

A step takes documents and lets fewer through; what one lets through the next one takes. Bytes are UTF-8 of text. What a
reader puts aside was no text yet, so its bytes are not counted. The ledger has no times, paths or names of machines:
the same inputs and pipeline give the same file.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, Self

import orjson
from pydantic import Field, ValidationError, model_validator

from megatron_joy.data.atomic import write_atomically
from megatron_joy.data.manifest import Count, ManifestPart, Sha256, Totals, describe_problems
from megatron_joy.errors import UserError

LEDGER_NAME = "ledger.json"
SAMPLES_NAME = "dropped_samples.jsonl"


class Step(ManifestPart):
    """documents_in = documents_out + dropped; bytes_in = bytes_out - bytes_changed + bytes_dropped."""

    name: str
    documents_in: Count
    documents_out: Count
    dropped: dict[str, Count] = Field(default_factory=dict, description="Documents by reason.")
    bytes_in: Count | None = Field(None, description="None for reading: what is put aside is no text.")
    bytes_out: Count
    bytes_changed: int = Field(0, description="What the step added to the texts that stay, or took away.")
    bytes_dropped: dict[str, Count] = Field(default_factory=dict, description="Bytes by reason.")
    documents_changed: Count = Field(0, description="Documents that stay with another text.")
    counts: dict[str, Count] = Field(
        default_factory=dict, description="What the step counted by itself: replacements, lines, languages, items."
    )

    @model_validator(mode="after")
    def _closes(self) -> Self:
        if self.documents_in != self.documents_out + sum(self.dropped.values()):
            raise ValueError(f"step {self.name}: documents in are not documents out and dropped")
        kept = self.bytes_out - self.bytes_changed + sum(self.bytes_dropped.values())
        if self.bytes_in is not None and self.bytes_in != kept:
            raise ValueError(f"step {self.name}: bytes in are not bytes out, changed and dropped")
        return self


class Ledger(ManifestPart):
    """The accounts of a run."""

    format_version: Literal[1] = 1
    pipeline: str
    description: str
    pipeline_sha256: Sha256
    code_version: str
    sources: dict[str, list[Step]] = Field(description="The same steps in the same order for every source.")
    splits: dict[str, Totals]
    totals: dict[str, Totals] = Field(description="What was written of each source, both splits together.")
    languages: dict[str, Totals] = Field(description="The same by language, where a transform identified any.")
    lengths: list[Count] = Field(description="Documents with 1, 2 to 3, 4 to 7, ... tokens.")
    scores: dict[str, dict[str, Count]] = Field(description="By column: how often each value, to two digits.")
    bounds: dict[str, tuple[float | None, float | None]] = Field(description="By column: least, below.")
    clusters: dict[str, Count] = Field(description="Clusters of near-duplicates by their size.")

    @property
    def steps(self) -> list[Step]:
        """The steps of all sources together."""
        return [_sum(parts) for parts in zip(*self.sources.values(), strict=True)]

    @model_validator(mode="after")
    def _chained(self) -> Self:
        for name, steps in self.sources.items():
            for before, after in pairwise(steps):
                if (before.documents_out, before.bytes_out) != (after.documents_in, after.bytes_in):
                    raise ValueError(f"source {name}: {after.name} did not take what {before.name} let through")
            written = self.totals[name]
            if (steps[-1].documents_out, steps[-1].bytes_out) != (written.documents, written.bytes_text):
                raise ValueError(f"source {name}: what {steps[-1].name} let through is not what was written")
        return self


def _added(tables: Sequence[dict[str, int]]) -> dict[str, int]:
    keys = dict.fromkeys(key for table in tables for key in table)
    return {key: sum(table.get(key, 0) for table in tables) for key in keys}


def _sum(parts: Sequence[Step]) -> Step:
    known = [part.bytes_in for part in parts if part.bytes_in is not None]
    return Step(
        name=parts[0].name,
        documents_in=sum(part.documents_in for part in parts),
        documents_out=sum(part.documents_out for part in parts),
        dropped=_added([part.dropped for part in parts]),
        bytes_in=sum(known) if len(known) == len(parts) else None,
        bytes_out=sum(part.bytes_out for part in parts),
        bytes_changed=sum(part.bytes_changed for part in parts),
        bytes_dropped=_added([part.bytes_dropped for part in parts]),
        documents_changed=sum(part.documents_changed for part in parts),
        counts=_added([part.counts for part in parts]),
    )


def write_ledger(folder: Path, ledger: Ledger) -> Path:
    """Write `ledger.json` into a pipeline's output folder, atomically."""
    path = folder / LEDGER_NAME
    write_atomically(path, orjson.dumps(ledger.model_dump(), option=orjson.OPT_INDENT_2) + b"\n")
    return path


def load_ledger(folder: Path) -> Ledger:
    """The ledger of a pipeline's output folder. Raises UserError when there is none, or one that does not close."""
    path = folder / LEDGER_NAME
    try:
        return Ledger.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: not there; give the output folder of a finished `joy data run`") from None
    except ValidationError as error:
        raise UserError(f"{path}: {describe_problems(error)}; run the pipeline again") from None
