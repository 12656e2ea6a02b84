"""`joy tokenizer train`: a tokenizer from files, without a pipeline."""

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.config import (
    OutputSection,
    Pipeline,
    SourceSection,
    TokenizerSection,
    problems_between,
)
from data_pipeline.inventory import DEFAULT_SUFFIXES, JSONL_SUFFIXES, MEGABYTE, Inventory, expand, take_inventory
from data_pipeline.readers.base import Rejected
from data_pipeline.readers.open import read_piece
from data_pipeline.spool import SPLIT_SCALE, text_hash
from data_pipeline.tokenizer import TOKENIZER_FILE, identify, save_tokenizer, train_tokenizer
from megatron_joy.errors import UserError

ALL_SUFFIXES = tuple(dict.fromkeys(suffix for known in DEFAULT_SUFFIXES.values() for suffix in known))


@dataclass
class TrainingReport:
    """What a tokenizer was trained on: unique documents, their UTF-8 bytes, and what was put aside by reason."""

    vocab_size: int = 0
    documents: int = 0
    bytes_text: int = 0
    put_aside: Counter[str] = field(default_factory=Counter)


def _sources(inputs: Sequence[str], text_field: str) -> list[SourceSection]:
    """JSONL files and all others, told apart by their endings."""
    paths: dict[str, None] = {}
    for pattern in inputs:
        found = dict.fromkeys(expand(pattern, ALL_SUFFIXES))
        if not found:
            raise UserError(f"--input {pattern}: matches no file; give a file, a folder or a glob that exists")
        paths |= found
    jsonl = [path for path in paths if path.endswith(JSONL_SUFFIXES)]
    other = [path for path in paths if not path.endswith(JSONL_SUFFIXES)]
    sources = [SourceSection(name="jsonl", reader="jsonl", paths=jsonl, text_field=text_field)] if jsonl else []
    return sources + ([SourceSection(name="text", reader="text", paths=other)] if other else [])


def _sample(pipeline: Pipeline, inventory: Inventory, report: TrainingReport) -> Iterator[str]:
    """Each different document once; of more text than asked for, a share chosen by the documents' hashes."""
    wanted = pipeline.tokenizer.sample_megabytes * MEGABYTE
    limit = SPLIT_SCALE * min(1.0, wanted / inventory.text_bytes)
    seen: set[bytes] = set()
    for task in inventory.tasks:
        for piece in task:
            for record in read_piece(pipeline, inventory.inputs[piece.input], piece):
                if isinstance(record, Rejected):
                    report.put_aside[record.reason] += 1
                    continue
                digest = text_hash(record.text)
                if digest in seen or struct.unpack_from("<I", digest)[0] >= limit:
                    continue
                seen.add(digest)
                report.documents += 1
                report.bytes_text += len(record.text)
                yield record.text.decode()


def train_on_files(
    inputs: Sequence[str],
    vocab_size: int,
    out: Path,
    text_field: str = "text",
    sample_megabytes: float = 100.0,
    special_tokens: Sequence[str] | None = None,
) -> TrainingReport:
    """Train byte-level BPE on JSONL and text files into the folder `out`.

    Raises UserError when an input matches nothing, the texts are too few, or `out` holds a tokenizer already.
    """
    if sample_megabytes <= 0:
        raise UserError(f"--sample-megabytes {sample_megabytes}: expects more than 0")
    if (out / TOKENIZER_FILE).exists():
        raise UserError(f"--out {out}: holds a tokenizer already; give another folder")
    named = {"special_tokens": list(special_tokens)} if special_tokens else {}
    section = TokenizerSection.model_validate(
        {"vocab_size": vocab_size, "sample_megabytes": float(sample_megabytes), **named}
    )
    pipeline = Pipeline(
        name="tokenizer",
        sources=_sources(inputs, text_field),
        tokenizer=section,
        output=OutputSection(folder=str(out)),
    )
    for problem in problems_between(pipeline):
        raise UserError(problem)
    report = TrainingReport()
    trained = train_tokenizer(_sample(pipeline, take_inventory(pipeline), report), vocab_size, section.special_tokens)
    save_tokenizer(trained, section.special_tokens, section.special_tokens[0], out)
    report.vocab_size = identify(out).vocab_size
    return report
