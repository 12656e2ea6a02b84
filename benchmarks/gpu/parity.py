"""Losses of three updates of joyai_tiny in fp32: portable blocks on the CPU against the same and `te` on a GPU.

    python benchmarks/gpu/parity.py portable

prints the losses of one backend on this machine's device as JSON; `throughput.py` compares them, and the weights that
both start from under the names of checkpoints.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.turns import batches_in_memory, short_run

from megatron_joy.model.build import build_model
from megatron_joy.platform import process as processes
from megatron_joy.prove.weights import largest_difference, write_whole
from megatron_joy.recipe import Recipe, load_recipe
from megatron_joy.train.step import Trainer

UPDATES = 3
SMALL = (
    "precision.params_dtype=fp32",
    "data.sequence_length=64",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
)
# Of a loss against the CPU's. Transformer Engine multiplies fp32 numbers in TF32, with 10 bits of their mantissas.
TOLERANCES = {"portable": 1e-4, "te": 5e-3}


def recipe_of(backend: str) -> Recipe:
    """joyai_tiny in fp32 with short sequences."""
    return load_recipe("joyai_tiny", [*short_run(UPDATES), *SMALL, f"model.backend={backend}"])


def losses(backend: str) -> list[float]:
    """The main loss of each update, on this process's device."""
    recipe = recipe_of(backend)
    process = processes.start(recipe.layout, recipe.seed)
    trainer = Trainer(recipe, process, build_model(recipe, process))
    batches = batches_in_memory(recipe)
    return [trainer.step(number, batches).loss for number in range(1, UPDATES + 1)]


def losses_on_cpu() -> list[float]:
    """The portable model's in a process that sees no GPU: which device a process has is decided when it starts."""
    command = [sys.executable, str(Path(__file__).resolve()), "portable"]
    # A meeting place would be the one where this process already is.
    inherited = {key: value for key, value in os.environ.items() if key not in ("MASTER_ADDR", "MASTER_PORT")}
    hidden = {**inherited, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=hidden, stdout=subprocess.PIPE, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def weights_apart(backend: str) -> float:
    """Largest difference of the backend's initial weights and the portable ones under the checkpoint's names.

    0 says that a checkpoint of one loads into the other. Raises ValueError or KeyError where names or shapes differ.
    """
    recipe, other = recipe_of("portable"), recipe_of(backend)
    process = processes.start(recipe.layout, recipe.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.safetensors"
        write_whole(whole, build_model(recipe, process), process)
        return float(largest_difference(whole, build_model(other, process), process).absolute)


def compare(backends: list[str], device: str) -> list[dict[str, object]]:
    """A row for each backend on this process's device: its losses, the CPU's, the largest difference, a verdict."""
    cpu = losses_on_cpu()
    rows: list[dict[str, object]] = []
    for backend in backends:
        mine = losses(backend)
        apart = max(abs(a - b) for a, b in zip(mine, cpu, strict=True))
        weights = weights_apart(backend)
        rows.append(
            {
                "backend": backend,
                "device": device,
                "losses": mine,
                "losses_on_cpu": cpu,
                "largest_difference": apart,
                "tolerance": TOLERANCES[backend],
                "weights_apart": weights,
                "holds": apart <= TOLERANCES[backend] and weights == 0,
            }
        )
    return rows


if __name__ == "__main__":
    print(json.dumps(losses(sys.argv[1])))
    processes.stop()
