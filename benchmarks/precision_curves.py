"""Does a recipe survive FP8? Loss curves in fp32, bf16 and emulated FP8, with another seed's as the measure of noise.

    python benchmarks/precision_curves.py [--recipe joyai_tiny] [--figure docs/figures/precision.svg] [k=v ...]

trains the recipe on one process once per variant (the demo's data must be there: `make data-demo`), prints one JSON
object each and writes the figure. All variants but the last see the same samples from the same weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from shared.figures import line_chart, smoothed

ALONE = ("layout.expert_model_parallel_size=1", "layout.data_parallel_size=1", "checkpoint.interval=0")
VARIANTS: dict[str, tuple[str, ...]] = {
    "fp32": ("precision.params_dtype=fp32",),
    "bf16": ("precision.params_dtype=bf16",),
    "bf16, FP8 blockwise": (
        "precision.params_dtype=bf16",
        "precision.fp8.recipe=blockwise",
        "precision.fp8.emulate=true",
    ),
    "bf16, FP8 tensorwise": (
        "precision.params_dtype=bf16",
        "precision.fp8.recipe=tensorwise",
        "precision.fp8.emulate=true",
    ),
    "fp32, another seed": ("precision.params_dtype=fp32", "seed=4321"),
}
WINDOW = 20  # steps that a drawn point and the last loss are means of


def run(recipe: str, overrides: list[str], folder: Path) -> list[dict[str, Any]]:
    """Trains and returns the rows of metrics.jsonl."""
    command = [sys.executable, "-m", "megatron_joy.cli.main", "pretrain", recipe, f"run.folder={folder}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(name: str, rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """The last losses and how far the curve was from fp32's."""
    away = [abs(row["loss"] - other["loss"]) for row, other in zip(rows, base, strict=True)]
    validation = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
    return {
        "variant": name,
        "steps": len(rows),
        "loss": round(sum(row["loss"] for row in rows[-WINDOW:]) / WINDOW, 4),
        "validation_loss": round(validation[-1], 4) if validation else None,
        "mean_distance_from_fp32": round(sum(away) / len(away), 4),
        "tokens_per_second": round(sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="joyai_tiny")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    curves: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, keys) in enumerate(VARIANTS.items()):
            curves[name] = run(given.recipe, [*ALONE, *given.overrides, *keys], Path(scratch) / str(number))
            print(json.dumps(summary(name, curves[name], curves["fp32"])), flush=True)
    if given.figure:
        lines = {name: smoothed([(r["step"], r["loss"]) for r in rows], WINDOW) for name, rows in curves.items()}
        title = f"{given.recipe}: training loss, mean of {WINDOW} steps"
        given.figure.write_text(line_chart(title, "step", "nats per token", lines))


if __name__ == "__main__":
    main()
