"""What a checkpoint costs the steps of a run: written beside training, and before the next step.

One model trains from memory, in cycles: some steps with nothing on its way, then a save beside training and steps until
it is committed. A drifting machine touches both kinds alike. At the end one synchronous save of the same state.

    python benchmarks/checkpoint_stall.py [--recipe joyai_mini] [--cycles 5] [--plain 6] [--threads 1] [k=v ...]

prints one JSON object. On a CPU the thread that writes takes its share of the cores that compute; with fewer threads
than cores it has one for itself, as on a machine whose GPUs compute. The promise is a ratio of at most 1.05.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from step_overhead import ONE_PROCESS, batches_in_memory

from megatron_joy.checkpoint.background import BackgroundSaver, Outcome
from megatron_joy.checkpoint.save import Save, save_checkpoint
from megatron_joy.model.build import build_model
from megatron_joy.platform import process as processes
from megatron_joy.recipe import load_recipe
from megatron_joy.train.step import Trainer

# A step of some seconds on a CPU: many of them fall into the writing of one checkpoint, as in a real run.
SMALL_STEPS = ("data.sequence_length=512", "train.global_batch_size=2", "train.micro_batch_size=1")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The cycles and the synchronous save."""
    quiet = [f"train.steps={10**6}", "train.validation_interval=0"]
    recipe = load_recipe(arguments.recipe, [*ONE_PROCESS, *SMALL_STEPS, *quiet, *arguments.overrides])
    torch.set_num_threads(arguments.threads)
    process = processes.start(recipe.layout, recipe.seed)
    trainer = Trainer(recipe, process, build_model(recipe, process))
    batches, number = batches_in_memory(recipe), 0
    saver, outcomes = BackgroundSaver(process), list[Outcome]()
    alone: list[float] = []
    beside: list[list[float]] = []

    def step() -> float:
        nonlocal number
        number += 1
        started = time.perf_counter()
        trainer.step(number, batches)
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        save = Save(Path(folder), 1, 0, recipe, process, {})
        for _ in range(2):
            step()  # the first ones warm up
        for _ in range(arguments.cycles):
            alone += [step() for _ in range(arguments.plain)]
            saver.begin(save, trainer.chunks, trainer.optimizer, list)
            beside.append([])
            outcome = None
            while outcome is None:
                beside[-1].append(step())
                outcome = saver.poll()
            assert outcome.failure is None, outcome.failure
            outcomes.append(outcome)
        saver.close()
        started = time.perf_counter()
        about = {"recipe": recipe, "chunks": trainer.chunks, "optimizer": trainer.optimizer, "process": process}
        path = save_checkpoint(Path(folder), 1, state={}, **about)
        synchronous = time.perf_counter() - started
        size = sum(file.stat().st_size for file in path.iterdir())
    processes.stop()
    return figures(alone, beside, outcomes) | {
        "recipe": recipe.name,
        "threads": arguments.threads,
        "megabytes": round(size / 1e6),
        "synchronous_seconds": round(synchronous, 2),
        "torch": torch.__version__,
    }


def figures(alone: list[float], beside: list[list[float]], outcomes: list[Outcome]) -> dict[str, Any]:
    """Medians; the first save, which makes the buffers, apart from the others."""
    steps = [seconds for cycle in beside for seconds in cycle]
    median = statistics.median(alone)
    return {
        "step_seconds_alone": round(median, 3),
        "step_seconds_beside_a_save": round(statistics.median(steps), 3),
        "ratio": round(statistics.median(steps) / median, 3),
        "quartiles_alone": [round(q, 3) for q in statistics.quantiles(alone, n=4)],
        "quartiles_beside": [round(q, 3) for q in statistics.quantiles(steps, n=4)],
        "steps_alone": len(alone),
        "steps_beside": len(steps),
        "first_waited_seconds": round(outcomes[0].waited, 3),
        "waited_seconds": round(statistics.median(one.waited for one in outcomes[1:]), 3),
        "seconds_to_commit": round(statistics.median(one.seconds for one in outcomes), 2),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="joyai_mini")
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--plain", type=int, default=6, help="steps with nothing on its way, a cycle")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="where checkpoints are written; none: the system's temporary folder")
    parser.add_argument("overrides", nargs="*", metavar="k=v")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
