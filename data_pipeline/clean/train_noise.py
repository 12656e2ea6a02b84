"""Train the line filter: `python -m data_pipeline.clean.train_noise --documents LABELLED.jsonl --out MODEL`.

A line of the file is a document: {"lines": ["...", ...], "keep": [true, false, ...]}, blank lines left out. Every tenth
document is held out; the command prints how well the model tells its lines apart.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data_pipeline.clean.noise import line_views
from data_pipeline.score.linear import LinearScorer, save_linear, train_linear
from data_pipeline.score.train import HELD_OUT, accuracy
from megatron_joy.errors import UserError, exit_code

BITS = 16
Views = tuple[list[str], list[str]]  # of lines to keep, of noise


def read_documents(path: Path) -> list[tuple[list[str], list[bool]]]:
    """(lines, whether each is kept) of each document. Raises UserError for a line that is no such document."""
    found = []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a JSONL file of labelled documents") from None
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row: Any = orjson.loads(line)
            lines, keep = [str(text) for text in row["lines"]], [bool(one) for one in row["keep"]]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise UserError(f'{path}: line {number} has no "lines" and "keep"; give both, as lists') from None
        if len(lines) != len(keep) or not all(text.strip() for text in lines):
            raise UserError(
                f"{path}: line {number} has {len(lines)} lines and {len(keep)} labels, expected one for each, none "
                "of them blank; mend it"
            )
        found.append((lines, keep))
    return found


def views_of(documents: Sequence[tuple[list[str], list[bool]]]) -> Views:
    """What the model sees of the lines to keep and of the noise."""
    kinds: Views = ([], [])
    for lines, keep in documents:
        for view, kept in zip(line_views([line.strip() for line in lines]), keep, strict=True):
            kinds[0 if kept else 1].append(view)
    return kinds


def evaluate(scorer: LinearScorer, views: Views, threshold: float) -> dict[str, float]:
    """Area under the ROC curve, and at a threshold the shares of text lines kept and of noise lines removed."""
    text, noise = (scorer.score(kind)[:, 0] for kind in views)
    return {
        "area_under_curve": accuracy(scorer, *views),
        "text_kept": float(np.mean(text >= threshold)),
        "noise_removed": float(np.mean(noise < threshold)),
    }


def run(arguments: Sequence[str]) -> int:
    """The command; returns its exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.clean.train_noise", description=__doc__)
    parser.add_argument("--documents", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threshold", type=float, default=0.3, help="what the printed shares are at")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args(arguments)
    documents = read_documents(options.documents)
    held = views_of(documents[::HELD_OUT])
    kept = views_of([document for number, document in enumerate(documents) if number % HELD_OUT])
    scorer = train_linear("text_line", kept[0], kept[1], options.epochs, bits=BITS)
    save_linear(scorer, options.out)
    result: dict[str, Any] = {"trained_on": list(map(len, kept)), "held_out": list(map(len, held))}
    if all(held):
        result |= evaluate(scorer, held, options.threshold)
    print(orjson.dumps(result).decode())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(run, sys.argv[1:]))
