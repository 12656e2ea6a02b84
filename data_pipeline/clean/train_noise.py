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

from data_pipeline.clean.noise import line_chances, line_features
from data_pipeline.score.linear import LinearScorer, Places, save_linear, train_on_features
from data_pipeline.score.train import HELD_OUT, area_under_curve
from megatron_joy.errors import UserError, exit_code

BITS = 16
Document = tuple[list[str], list[bool]]  # its lines, none blank or with a line feed, and whether each is kept


def read_documents(path: Path) -> list[Document]:
    """The documents of a file. Raises UserError for a line that is no such document."""
    found = []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a JSONL file of labelled documents") from None
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row: Any = orjson.loads(line)
            lines, keep = [str(text).strip() for text in row["lines"]], [bool(one) for one in row["keep"]]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise UserError(f'{path}: line {number} has no "lines" and "keep"; give both, as lists') from None
        if len(lines) != len(keep) or not all(text and "\n" not in text for text in lines):
            raise UserError(
                f"{path}: line {number} has {len(lines)} lines and {len(keep)} labels, expected one for each, none "
                "of them blank or with a line feed inside; mend it"
            )
        found.append((lines, keep))
    return found


def train(documents: Sequence[Document], epochs: int = 5) -> LinearScorer:
    """A model of what is kept. Raises UserError when there is nothing to keep or no noise."""
    kinds: tuple[list[Places], list[Places]] = ([], [])
    for lines, keep in documents:
        for places, kept in zip(line_features("\n".join(lines), BITS), keep, strict=True):
            kinds[0 if kept else 1].append(places)
    return train_on_features("text_line", *kinds, epochs, bits=BITS)


def evaluate(scorer: LinearScorer, documents: Sequence[Document], threshold: float) -> dict[str, float]:
    """Area under the ROC curve, and at a threshold the shares of text lines kept and of noise lines removed."""
    chances = np.concatenate([line_chances(scorer, "\n".join(lines))[0] for lines, _ in documents if lines])
    kept = np.array([one for _, keep in documents for one in keep], dtype=np.bool_)
    text, noise = chances[kept], chances[~kept]
    return {
        "area_under_curve": area_under_curve(text, noise),
        "text_kept": float(np.mean(text >= threshold)),
        "noise_removed": float(np.mean(noise < threshold)),
    }


def count_kinds(documents: Sequence[Document]) -> list[int]:
    """How many lines are to keep, and how many are noise."""
    kept = sum(sum(keep) for _, keep in documents)
    return [kept, sum(len(keep) for _, keep in documents) - kept]


def run(arguments: Sequence[str]) -> int:
    """The command; returns its exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.clean.train_noise", description=__doc__)
    parser.add_argument("--documents", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threshold", type=float, default=0.3, help="what the printed shares are at")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args(arguments)
    documents = read_documents(options.documents)
    held = documents[::HELD_OUT]
    used = [document for number, document in enumerate(documents) if number % HELD_OUT]
    scorer = train(used, options.epochs)
    save_linear(scorer, options.out)
    result: dict[str, Any] = {"trained_on": count_kinds(used), "held_out": count_kinds(held)}
    if all(result["held_out"]):
        result |= evaluate(scorer, held, options.threshold)
    print(orjson.dumps(result).decode())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(run, sys.argv[1:]))
