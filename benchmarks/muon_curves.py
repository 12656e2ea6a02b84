"""Muon against AdamW at equal tokens: the same samples from the same weights, at two learning rates each.

    python benchmarks/muon_curves.py [--recipe joyai_tiny] [--figure docs/figures/muon.svg] [k=v ...]

trains the recipe on one process once per variant (the demo's data must be there: `make data-demo`), prints one JSON
object each and writes the figure.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from shared.curves import WINDOW, Rows, compare
from shared.figures import smoothed

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


def figures(rows: Rows, base: Rows) -> dict[str, Any]:
    """Cost, and the tokens after which this run's smoothed loss was the base's last one."""
    curve = smoothed([(row["tokens"], row["loss"]) for row in rows], WINDOW)
    goal = smoothed([(row["tokens"], row["loss"]) for row in base], WINDOW)[-1][1]
    return {
        "tokens": rows[-1]["tokens"],
        "tokens_to_the_first_runs_loss": next((int(tokens) for tokens, loss in curve if loss <= goal), None),
        "largest_gradient_norm": round(max(row["grad_norm"] for row in rows), 2),
        "seconds_a_step": round(sorted(row["step_seconds"] for row in rows)[len(rows) // 2], 3),
    }


if __name__ == "__main__":
    compare((__doc__ or "").splitlines()[0], VARIANTS, figures)
