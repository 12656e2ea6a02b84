"""What our training loop costs: its step with all features against a bare loop around the same Megatron-core model.

Both update the same model with the same micro-batches from memory, in turns (ours, bare, ours, bare, ...), so that a
drifting machine touches both alike. Bare means Megatron-core's schedule, its distributed optimizer, a masked mean loss
and nothing else: no global token counts, no expert load, no guard, no signal check, no metrics file.

    python benchmarks/step_overhead.py [--recipe joyai_tiny] [--pairs 20] [--cpu] [k=v ...]

prints the medians and their ratio; the promise is at most 1.05. --cpu counts seconds of the CPU instead of the clock's,
for a machine that others use too.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from shared.turns import batches_in_memory, in_turns, now, of_cpu, short_run

from megatron_joy.model.build import build_model
from megatron_joy.platform import process as processes
from megatron_joy.recipe import load_recipe
from megatron_joy.train.step import Trainer


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="joyai_tiny")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--cpu", action="store_true", help="seconds of the CPU, not the clock's")
    parser.add_argument("overrides", nargs="*", metavar="k=v")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, [*short_run(arguments.pairs), *arguments.overrides])
    process = processes.start(recipe.layout, recipe.seed)
    trainer = Trainer(recipe, process, build_model(recipe, process))
    with tempfile.TemporaryDirectory() as folder:
        seconds = of_cpu if arguments.cpu else now
        ours, bare = in_turns(trainer, trainer, batches_in_memory(recipe), arguments.pairs, Path(folder), seconds)
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    result: dict[str, Any] = {
        "recipe": recipe.name,
        "pairs": len(ratios),
        "seconds_of": "cpu" if arguments.cpu else "clock",
        "ours_seconds": round(statistics.median(ours), 4),
        "bare_seconds": round(statistics.median(bare), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))
    processes.stop()


if __name__ == "__main__":
    main()
