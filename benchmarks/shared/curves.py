"""A recipe trained once per variant, one after the other, and their loss curves in one figure."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.figures import line_chart, smoothed

ALONE = ("layout.expert_model_parallel_size=1", "layout.data_parallel_size=1", "checkpoint.interval=0")
WINDOW = 20  # steps that a drawn point and the last loss are means of

Rows = list[dict[str, Any]]  # of metrics.jsonl


def _finished(folder: Path) -> Rows | None:
    """The rows of a run that is at its end."""
    recipe, metrics = folder / "recipe.toml", folder / "metrics.jsonl"
    if not (recipe.is_file() and metrics.is_file()):
        return None
    rows: Rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return rows if rows and rows[-1]["step"] == tomllib.loads(recipe.read_text())["train"]["steps"] else None


def _run(recipe: str, overrides: Sequence[str], folder: Path) -> Rows:
    if (rows := _finished(folder)) is not None:
        return rows
    command = [sys.executable, "-m", "megatron_joy.cli.main", "pretrain", recipe, f"run.folder={folder}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last_losses(rows: Rows) -> dict[str, Any]:
    """Steps, training loss at the end and the last validation loss, if there was one."""
    validation = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
    return {
        "steps": len(rows),
        "loss": round(sum(row["loss"] for row in rows[-WINDOW:]) / WINDOW, 4),
        "validation_loss": round(validation[-1], 4) if validation else None,
    }


def compare(
    description: str, variants: Mapping[str, Sequence[str]], figures: Callable[[Rows, Rows], dict[str, Any]]
) -> None:
    """A benchmark's command line. variants: overrides by name; figures: what is printed of a run beside the first."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--recipe", default="joyai_tiny")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", choices=[*variants], default=[*variants])
    parser.add_argument("--runs", type=Path, help="keep runs here, and take finished ones as they are")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    curves: dict[str, Rows] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.only:
            folder = (given.runs or Path(scratch)) / re.sub(r"\W+", "_", name)
            curves[name] = _run(given.recipe, [*ALONE, *given.overrides, *variants[name]], folder)
            first = next(iter(curves.values()))
            told = {"variant": name, **last_losses(curves[name]), **figures(curves[name], first)}
            print(json.dumps(told), flush=True)
    if given.figure:
        lines = {name: smoothed([(r["step"], r["loss"]) for r in rows], WINDOW) for name, rows in curves.items()}
        title = f"{given.recipe}: training loss, mean of {WINDOW} steps"
        given.figure.write_text(line_chart(title, "step", "nats per token", lines))
