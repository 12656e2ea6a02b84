"""What the portable blocks (plain torch, no Transformer Engine) do on a GPU: speed in BF16, and the CPU's losses.

    python benchmarks/gpu/portable.py [--steps 8] [--out FILE] [k=v ...]

Models have the true widths of joyai_48b_a3b with fewer layers: 4 with 32 experts, and 2 with all 256. For each and for
both optimizers the median step, tokens a second, MFU against the GPU's dense BF16 peak and the peak of memory. Then the
losses of a tiny model in fp32 against the CPU's. Exit code 1 where those differ, 2 without a GPU.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu import parity
from shared.turns import batches_in_memory, short_run

from megatron_joy.model.build import build_model
from megatron_joy.parallel import flops
from megatron_joy.platform import process as processes
from megatron_joy.recipe import Recipe, load_recipe
from megatron_joy.train.features.usage import peak_flops
from megatron_joy.train.step import Trainer

WARM_UP = 3
COMMON = ("stages=[]", "model.backend=portable", "train.recompute=none", "train.global_batch_size=8")
SIZES = {
    "4 layers, 32 experts": ("model.num_hidden_layers=4", "model.n_routed_experts=32"),
    "2 layers, 256 experts": ("model.num_hidden_layers=2",),
}


def measure(recipe: Recipe, process: processes.Process, steps: int) -> dict[str, Any]:
    """The median step of a recipe's model, and what follows from it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    length = recipe.data.sequence_length
    batches = batches_in_memory(recipe, length // 16, length // 2)
    trainer = Trainer(recipe, process, build_model(recipe, process))
    seconds, losses = [], []
    for number in range(1, WARM_UP + steps + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        losses.append(trainer.step(number, batches).loss)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[WARM_UP:])
    tokens = sum(batch.tokens.numel() for batch in batches)
    cost = flops.per_token(recipe, sum(batch.attended for batch in batches) / tokens)
    peak = peak_flops(recipe, process.device)
    return {
        "parameters": sum(p.numel() for p in trainer.models[0].parameters()),
        "seconds": median,
        "quartiles": statistics.quantiles(seconds[WARM_UP:], n=4),
        "tokens_per_second": tokens / median,
        "mfu": None if peak is None else tokens / median * cost / peak,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "losses": losses,
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every size with every optimizer, then the parity; written to --out as far as it got."""
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rows": [],
    }
    process = None
    for size, keys in SIZES.items():
        for optimizer in ("adamw", "muon"):
            words = [*short_run(arguments.steps + WARM_UP), *COMMON, *keys, f"optimizer.name={optimizer}"]
            recipe = load_recipe("joyai_48b_a3b", [*words, *arguments.overrides])
            process = process or processes.start(recipe.layout, recipe.seed)
            row = {"size": size, "optimizer": optimizer, **measure(recipe, process, arguments.steps)}
            print(
                f"{size}, {optimizer}: {row['parameters']:,} parameters, {row['seconds']:.3f} s a step, "
                f"{row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu'] or 0:.1%}, "
                f"{row['peak_bytes'] / 2**30:.1f} GiB, loss {row['losses'][0]:.3f} to {row['losses'][-1]:.3f}",
                flush=True,
            )
            result["rows"].append(row)
            if arguments.out:
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    result["parity"] = parity.compare(["portable"], result["device"])
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> int:
    """Measures, prints and says how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="k=v")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("portable.py: no CUDA GPU to measure on", file=sys.stderr)
        return 2
    (row,) = run(arguments)["parity"]
    verdict = "within" if row["holds"] else "NOT within"
    print(f"fp32 losses against the CPU's: {row['largest_difference']:.1e} apart, {verdict} {row['tolerance']:g}")
    processes.stop()
    return 0 if row["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
