"""Muon against AdamW at equal tokens: the same samples from the same weights, at two learning rates each.

    python benchmarks/muon_curves.py [--recipe joyai_tiny] [--figure docs/figures/muon.svg] [k=v ...]

trains the recipe on one process once per variant (the demo's data must be there: `make data-demo`), prints one JSON
object each and writes the figure.
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
RATES = ("3e-3", "1e-3")
VARIANTS = {
    f"{label}, {rate}": (
        f"optimizer.name={name}",
        f"schedule.peak_lr={rate}",
        f"schedule.final_lr={float(rate) / 10:g}",
    )
    for rate in RATES
    for label, name in (("AdamW", "adamw"), ("Muon", "muon"))
}
WINDOW = 20  # steps that a drawn point and the last loss are means of


def run(recipe: str, overrides: list[str], folder: Path) -> list[dict[str, Any]]:
    """Trains and returns the rows of metrics.jsonl."""
    command = [sys.executable, "-m", "megatron_joy.cli.main", "pretrain", recipe, f"run.folder={folder}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(name: str, rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """The last losses, and the tokens after which this run's smoothed loss was the base's last one."""
    curve = smoothed([(row["tokens"], row["loss"]) for row in rows], WINDOW)
    goal = smoothed([(row["tokens"], row["loss"]) for row in base], WINDOW)[-1][1]
    validation = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
    return {
        "variant": name,
        "steps": len(rows),
        "tokens": rows[-1]["tokens"],
        "loss": round(sum(row["loss"] for row in rows[-WINDOW:]) / WINDOW, 4),
        "validation_loss": round(validation[-1], 4) if validation else None,
        "tokens_to_the_first_runs_loss": next((int(tokens) for tokens, loss in curve if loss <= goal), None),
        "largest_gradient_norm": round(max(row["grad_norm"] for row in rows), 2),
        "seconds_a_step": round(sorted(row["step_seconds"] for row in rows)[len(rows) // 2], 3),
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
            print(json.dumps(summary(name, curves[name], next(iter(curves.values())))), flush=True)
    if given.figure:
        lines = {name: smoothed([(r["step"], r["loss"]) for r in rows], WINDOW) for name, rows in curves.items()}
        title = f"{given.recipe}: training loss, mean of {WINDOW} steps"
        given.figure.write_text(line_chart(title, "step", "nats per token", lines))


if __name__ == "__main__":
    main()
