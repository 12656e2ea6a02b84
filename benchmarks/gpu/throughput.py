"""Tokens per second and MFU of a JoyAI of true widths on one GPU, in BF16 and FP8, beside Megatron-core's own model.

    python benchmarks/gpu/throughput.py [--optimizer adamw] [--pairs 20] [--precisions bf16,blockwise] [--out FILE]
        [k=v ...]
    python benchmarks/gpu/throughput.py --dry-run

The recipe is joyai_48b_a3b with 4 layers and 32 experts (1.2B parameters), which fits a GPU of 80 GB twice: once built
and trained by us, once from Megatron-core's own specification on Transformer Engine with the same settings, weights,
micro-batches and optimizer, in a bare loop. Both take turns (ours, theirs, ours, ...), so that a drifting machine
touches both alike. MFU is against the GPU's dense peak in BF16 in every precision. That both are one model is checked:
as many parameters, the same loss at the start. Then the losses of a tiny model in fp32 are held against the CPU's.
Models of an earlier precision stay in memory: give one a call where they don't fit side by side (53 GB each in BF16).

--dry-run goes the same way with tiny widths, few steps and portable blocks (FP8 emulated) on whatever there is; its
figures mean nothing. Exit code: 0, 1 where the two models or the losses differ, 2 where nothing could be measured.
"""

import argparse
import gc
import importlib.metadata
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu import parity
from gpu.reference import reference_trainer
from shared.turns import batches_in_memory, in_turns, short_run

from megatron_joy.errors import UserError
from megatron_joy.model.backends.select import transformer_engine_problem
from megatron_joy.model.build import build_model
from megatron_joy.parallel import flops
from megatron_joy.platform import process as processes
from megatron_joy.platform.nvidia import gpu_states
from megatron_joy.platform.process import Process
from megatron_joy.recipe import Recipe, load_recipe
from megatron_joy.train.features.usage import peak_flops
from megatron_joy.train.step import Trainer

# Least compute capability of each precision's products in Transformer Engine.
PRECISIONS = {"bf16": (8, 0), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
ONE_DEVICE = (
    "model.num_hidden_layers=4",
    "model.n_routed_experts=32",
    "stages=[]",
    "train.global_batch_size=8",
    "train.recompute=none",
)
TINY = (
    "model.vocab_size=512",
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.q_lora_rank=32",
    "model.kv_lora_rank=32",
    "model.qk_nope_head_dim=16",
    "model.qk_rope_head_dim=32",
    "model.v_head_dim=16",
    "model.intermediate_size=64",
    "model.moe_intermediate_size=32",
    "model.n_routed_experts=4",
    "model.num_experts_per_tok=2",
    "data.sequence_length=64",
    "train.global_batch_size=2",
    "model.backend=portable",
)
SAME_LOSS = 0.02  # between the two models at the start: rounding of fused and separate norms, in bf16 and FP8


def recipe_of(arguments: argparse.Namespace, precision: str) -> Recipe:
    """The recipe to measure in a precision; overrides of the command line come last."""
    keys = [*short_run(arguments.pairs), *ONE_DEVICE, f"optimizer.name={arguments.optimizer}"]
    keys += TINY if arguments.dry_run else ("model.backend=te",)
    if precision != "bf16":
        keys.append(f"precision.fp8.recipe={precision}")
        keys += ["precision.fp8.emulate=true"] if arguments.dry_run else []
    return load_recipe("joyai_48b_a3b", [*keys, *arguments.overrides])


def missing(precision: str) -> str | None:
    """Why this GPU can't multiply so, or None."""
    wanted, found = PRECISIONS[precision], torch.cuda.get_device_capability()
    if found >= wanted:
        return None
    return f"needs compute capability {wanted[0]}.{wanted[1]}, this GPU has {found[0]}.{found[1]}"


def speed(recipe: Recipe, seconds: list[float], tokens: int, flops_per_token: float, peak: float | None) -> Any:
    """Of one of the two: the median step, and what follows from it."""
    median = statistics.median(seconds)
    rate = tokens / median
    mfu = None if peak is None else rate * flops_per_token / peak
    return {"seconds": median, "tokens_per_second": rate, "mfu": mfu}


def measure(recipe: Recipe, process: Process, precision: str, pairs: int) -> dict[str, Any]:
    """Both models' speed and what tells that they are one model."""
    gc.collect()
    if process.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    length = recipe.data.sequence_length
    batches = batches_in_memory(recipe, length // 16, length // 2)
    ours = Trainer(recipe, process, build_model(recipe, process))
    theirs = reference_trainer(recipe, process)
    counts = [sum(p.numel() for p in trainer.models[0].parameters()) for trainer in (ours, theirs)]
    starts = [trainer.evaluate(batches).main for trainer in (ours, theirs)]
    with tempfile.TemporaryDirectory() as folder:
        mine, bare = in_turns(ours, theirs, batches, pairs, Path(folder))
    tokens = sum(batch.tokens.numel() for batch in batches)
    keys = sum(batch.attended for batch in batches) / tokens
    cost, peak = flops.per_token(recipe, keys), peak_flops(recipe, process.device)
    ratios = [a / b for a, b in zip(mine, bare, strict=True)]
    return {
        "precision": precision,
        "pairs": len(ratios),
        "tokens_per_step": tokens,
        "keys_per_token": keys,
        "model_flops_per_token": cost,
        "peak_flops": peak,
        "ours": speed(recipe, mine, tokens, cost, peak),
        "megatron_core": speed(recipe, bare, tokens, cost, peak),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4),
        "parameters": counts,
        "losses_at_start": starts,
        "one_model": counts[0] == counts[1] and abs(starts[0] - starts[1]) <= SAME_LOSS,
        "peak_bytes_of_both": torch.cuda.max_memory_allocated() if process.device.type == "cuda" else None,
    }


def environment(arguments: argparse.Namespace, process: Process) -> dict[str, Any]:
    """The device and the versions of what computes on it."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    on_gpu = process.device.type == "cuda"
    states = gpu_states()
    return {
        "dry_run": arguments.dry_run,
        "device": torch.cuda.get_device_name(process.device) if on_gpu else "cpu",
        "driver": states[0].get("driver_version") if states else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "megatron_core": version("megatron-core"),
        "transformer_engine": version("transformer-engine"),
        "optimizer": arguments.optimizer,
        "overrides": arguments.overrides,
    }


def show(result: dict[str, Any]) -> None:
    """The result for reading."""
    about = result["environment"]
    print(", ".join(f"{key} {value}" for key, value in about.items() if value and key not in ("overrides", "dry_run")))
    line = "{:<11}{:>14}{:>8}{:>14}{:>8}{:>8}  {}"
    print(line.format("precision", "ours tok/s", "MFU", "Megatron's", "MFU", "ratio", "quartiles"))

    def cells(of: dict[str, Any]) -> tuple[str, str]:
        return f"{of['tokens_per_second']:,.0f}", "-" if of["mfu"] is None else f"{of['mfu']:.1%}"

    for row in result["rows"]:
        spread = f"{row['ratio_quartiles'][0]:.3f} to {row['ratio_quartiles'][2]:.3f}"
        own, other = cells(row["ours"]), cells(row["megatron_core"])
        print(line.format(row["precision"], *own, *other, f"{row['ratio']:.3f}", spread))
        if not row["one_model"]:
            print(f"  not one model: parameters {row['parameters']}, losses at the start {row['losses_at_start']}")
    for precision, reason in result["skipped"].items():
        print(f"{precision:<11}not measured: {reason}")
    for row in result["parity"]:
        verdict = "within" if row["holds"] else "NOT within"
        print(
            f"fp32 losses, {row['backend']} on {row['device']} against the CPU: "
            f"{row['largest_difference']:.1e} apart, {verdict} {row['tolerance']:g}"
        )
    if about["dry_run"]:
        print("dry run: both models are of portable blocks, the figures mean nothing")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, written to --out as far as it got after each part."""
    recipes = {name: recipe_of(arguments, name) for name in arguments.precisions}
    first = next(iter(recipes.values()))
    process = processes.start(first.layout, first.seed)
    result: dict[str, Any] = {"environment": environment(arguments, process), "rows": [], "skipped": {}, "parity": []}

    def keep() -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")

    keep()
    for name, recipe in recipes.items():
        reason = None if arguments.dry_run else missing(name)
        if reason is not None:
            result["skipped"][name] = reason
            continue
        result["rows"].append(measure(recipe, process, name, arguments.pairs))
        keep()
    backends = ["portable"] if arguments.dry_run else ["portable", "te"]
    result["parity"] = parity.compare(backends, result["environment"]["device"])
    keep()
    return result


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--pairs", type=int, help="measured pairs of steps (20; 2 in a dry run)")
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=list(PRECISIONS))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", metavar="k=v")
    arguments = parser.parse_args(words)
    arguments.pairs = arguments.pairs or (2 if arguments.dry_run else 20)
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Measures, prints and says how it went."""
    arguments = parsed(words)
    try:
        unknown = [name for name in arguments.precisions if name not in PRECISIONS]
        if unknown:
            raise UserError(f"--precisions {unknown[0]}: not known; choose from {', '.join(PRECISIONS)}")
        if arguments.pairs < 2:
            raise UserError(f"--pairs {arguments.pairs}: too few for quartiles; give 2 or more")
        if arguments.out and not arguments.out.parent.is_dir():
            raise UserError(f"--out {arguments.out}: {arguments.out.parent} is no folder; make it first")
        problem = None if arguments.dry_run else transformer_engine_problem()
        if problem is not None:
            raise UserError(f"nothing to measure on: {problem}; use a CUDA GPU with Transformer Engine, or --dry-run")
        result = run(arguments)
    except UserError as error:
        print(f"throughput.py: {error}", file=sys.stderr)
        return 2
    show(result)
    processes.stop()
    return 0 if all(r["one_model"] for r in result["rows"]) and all(r["holds"] for r in result["parity"]) else 1


if __name__ == "__main__":
    sys.exit(main())
