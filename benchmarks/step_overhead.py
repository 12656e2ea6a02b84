"""What our training loop costs: its step with all features against a bare loop around the same Megatron-core model.

Both update the same model with the same micro-batches from memory, in turns (ours, bare, ours, bare, ...), so that a
drifting machine touches both alike. Bare means Megatron-core's schedule, its distributed optimizer, a masked mean loss
and nothing else: no global token counts, no expert load, no guard, no signal check, no metrics file.

    python benchmarks/step_overhead.py [--recipe joyai_tiny] [--pairs 20] [k=v ...]

prints the medians and their ratio; the promise is at most 1.05.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_joy.data.batch import Batch, make_batch
from megatron_joy.data.stream import Sample
from megatron_joy.model.build import build_model
from megatron_joy.platform import process as processes
from megatron_joy.platform.process import Process
from megatron_joy.platform.stop_request import StopRequest
from megatron_joy.recipe import Recipe, load_recipe
from megatron_joy.recipe.ledger import begin
from megatron_joy.train.features.guard import Guard
from megatron_joy.train.features.metrics import Metrics
from megatron_joy.train.features.rollback import Rollback
from megatron_joy.train.features.signals import StopOnSignal
from megatron_joy.train.features.stopwatch import Stopwatch
from megatron_joy.train.features.terminal import Terminal
from megatron_joy.train.features.usage import Usage
from megatron_joy.train.forward import MicroBatch, forward_step
from megatron_joy.train.loop import Loop, train
from megatron_joy.train.run import Progress, Run
from megatron_joy.train.step import Trainer

ONE_PROCESS = [
    f"layout.{key}=1"
    for key in (
        "data_parallel_size",
        "expert_model_parallel_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
    )
]
EOD = 1


class OneSource:
    """Stands for the stream in the metrics row; samples come from memory."""

    def sources_in(self, samples: range) -> dict[str, int]:
        """All of one source."""
        return {"memory": len(samples)}


def batches_in_memory(recipe: Recipe) -> list[Batch]:
    """One step's micro-batches of random tokens with documents of 20 to 200 tokens."""
    random = np.random.default_rng(recipe.seed)
    size, length = recipe.train.micro_batch_size, recipe.data.sequence_length

    def sample() -> Sample:
        tokens = random.integers(2, recipe.model.vocab_size, length + 1)
        tokens[np.cumsum(random.integers(20, 200, length // 20)).clip(max=length)] = EOD
        return Sample(tokens, "memory", 0, 0, 0, EOD)

    count = recipe.train.global_batch_size // size
    return [make_batch([sample() for _ in range(size)], True, EOD) for _ in range(count)]


def bare_step(trainer: Trainer, process: Process, batches: Sequence[Batch], recipe: Recipe) -> None:
    """The least that trains this model with Megatron-core."""
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    trainer.schedule(
        forward_step_func=partial(forward_step, process, recipe.model.num_nextn_predict_layers > 0),
        data_iterator=iter([MicroBatch(batch, 1.0) for batch in batches]),
        model=trainer.chunks[0],
        num_microbatches=len(batches),
        seq_length=recipe.data.sequence_length * recipe.train.micro_batch_size,
        micro_batch_size=1,
        forward_only=False,
    )
    trainer.optimizer.step()


def in_turns(
    trainer: Trainer, process: Process, recipe: Recipe, pairs: int, folder: Path
) -> tuple[list[float], list[float]]:
    """Seconds of each of our steps and of each bare step."""
    batches = batches_in_memory(recipe)
    ours: list[float] = []
    bare: list[float] = []
    run = Run(recipe, process, folder, 0, Progress(), begin(recipe))
    metrics = Metrics(run, OneSource(), None)  # type: ignore[arg-type]
    guard = Guard(Rollback(OneSource(), None))  # type: ignore[arg-type]
    features = [Stopwatch(), StopOnSignal(StopRequest()), Usage(recipe, None), metrics, Terminal(None), guard]
    marks: list[float] = []

    def turns() -> Iterator[list[Batch]]:
        for _ in range(pairs + 2):
            if marks:
                ours.append(time.perf_counter() - marks[-1])
            started = time.perf_counter()
            bare_step(trainer, process, batches, recipe)
            bare.append(time.perf_counter() - started)
            marks.append(time.perf_counter())
            yield batches

    train(Loop(run, trainer, features), turns())
    return ours[1:], bare[1:-1]  # the first pair warms up


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="joyai_tiny")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("overrides", nargs="*", metavar="k=v")
    arguments = parser.parse_args()
    steps = arguments.pairs + 2
    quiet = [f"train.steps={steps}", "schedule.warmup_steps=0", "schedule.decay_steps=0", f"train.log_interval={steps}"]
    no_validation = ["train.validation_interval=0"]
    recipe = load_recipe(arguments.recipe, [*ONE_PROCESS, *quiet, *no_validation, *arguments.overrides])
    process = processes.start(recipe.layout, recipe.seed)
    trainer = Trainer(recipe, process, build_model(recipe, process))
    with tempfile.TemporaryDirectory() as folder:
        ours, bare = in_turns(trainer, process, recipe, arguments.pairs, Path(folder))
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    result: dict[str, Any] = {
        "recipe": recipe.name,
        "pairs": len(ratios),
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
