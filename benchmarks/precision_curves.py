"""Does a recipe survive FP8? Loss curves in fp32, bf16 and emulated FP8, with another seed's as the measure of noise.

    python benchmarks/precision_curves.py [--recipe joyai_tiny] [--figure docs/figures/precision.svg]
        [--only fp32 "bf16, FP8 delayed"] [k=v ...]

trains the recipe on one process once per variant (the demo's data must be there: `make data-demo`), prints one JSON
object each and writes the figure. All variants but the last see the same samples from the same weights.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from shared.curves import Rows, compare

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
    "bf16, FP8 delayed": (
        "precision.params_dtype=bf16",
        "precision.fp8.recipe=delayed",
        "precision.fp8.emulate=true",
    ),
    "fp32, another seed": ("precision.params_dtype=fp32", "seed=4321"),
}


def figures(rows: Rows, fp32: Rows) -> dict[str, Any]:
    """How far the curve was from fp32's."""
    away = [abs(row["loss"] - other["loss"]) for row, other in zip(rows, fp32, strict=True)]
    return {
        "mean_distance_from_fp32": round(sum(away) / len(away), 4),
        "tokens_per_second": round(sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2]),
    }


if __name__ == "__main__":
    compare((__doc__ or "").splitlines()[0], VARIANTS, figures)
