"""`joy tokenizer`: train one."""

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.readers.base import REASONS
from data_pipeline.train_tokenizer import train_on_files

app = typer.Typer(help="Tokenizers. Example: joy tokenizer train --input docs --vocab-size 8192 --out tokenizers/docs")


@app.callback()
def group() -> None:
    """Tokenizers."""


@app.command(
    "train", epilog="Example: joy tokenizer train --input data/*.jsonl --vocab-size 32768 --out tokenizers/mine"
)
def train_command(
    inputs: Annotated[list[str], typer.Option("--input", help="File, folder or glob; give it again for more.")],
    vocab_size: Annotated[int, typer.Option(help="Entries, special tokens included.")],
    out: Annotated[Path, typer.Option(help="Folder for tokenizer.json and tokenizer_config.json.")],
    text_field: Annotated[str, typer.Option(help="Field of JSONL records.")] = "text",
    sample_megabytes: Annotated[float, typer.Option(help="Text to train on.")] = 100.0,
    special_token: Annotated[list[str] | None, typer.Option(help="The first one ends documents.")] = None,
) -> None:
    """Train byte-level BPE on JSONL (also .gz, .zst) and text files; the same input gives the same bytes."""
    report = train_on_files(inputs, vocab_size, out, text_field, sample_megabytes, special_token)
    print(f"{out}: {report.vocab_size} entries from {report.documents} documents, {report.bytes_text / 1e6:.1f} MB")
    for reason, number in sorted(report.put_aside.items()):
        print(f"put aside: {number} {reason} ({REASONS[reason]})")
