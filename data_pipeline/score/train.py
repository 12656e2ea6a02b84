"""Train a linear scorer: `python -m data_pipeline.score.train --positive GOOD.jsonl --negative BAD.jsonl --out MODEL`.

Every tenth text of each file is held out; the command prints how well the model tells them apart.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import orjson

from data_pipeline.score.base import Scores
from data_pipeline.score.linear import save_linear, train_linear
from megatron_joy.errors import UserError, exit_code

HELD_OUT = 10


def read_texts(path: Path, field: str) -> list[str]:
    """The texts of a JSONL file. Raises UserError for a line without one."""
    found = []
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    text = orjson.loads(line).get(field)
                    if not isinstance(text, str):
                        raise UserError(f"{path}: line {number} has no string {field!r}; give --field")
                    found.append(text)
    except (OSError, orjson.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{path}: not a JSONL file of objects ({error}); give one text a line") from None
    return found


def area_under_curve(good: Scores, bad: Scores) -> float:
    """Share of pairs, one score of each kind, that are in the right order (the area under the ROC curve)."""
    wins = (good[:, None] > bad[None, :]).mean() + 0.5 * (good[:, None] == bad[None, :]).mean()
    return float(wins)


def run(arguments: Sequence[str]) -> int:
    """The command; returns its exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.score.train", description=__doc__)
    parser.add_argument("--positive", type=Path, required=True)
    parser.add_argument("--negative", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="quality", help="of the score's column")
    parser.add_argument("--field", default="text")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args(arguments)
    kinds = [read_texts(path, options.field) for path in (options.positive, options.negative)]
    kept = [[text for number, text in enumerate(kind) if number % HELD_OUT] for kind in kinds]
    held = [kind[::HELD_OUT] for kind in kinds]
    scorer = train_linear(options.name, kept[0], kept[1], options.epochs)
    save_linear(scorer, options.out)
    result = {
        "trained_on": [len(kind) for kind in kept],
        "held_out": [len(kind) for kind in held],
        "area_under_curve": area_under_curve(*(scorer.score(kind)[:, 0] for kind in held)) if all(held) else None,
    }
    print(orjson.dumps(result).decode())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(run, sys.argv[1:]))
