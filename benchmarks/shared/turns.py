"""Our training loop and a bare one around Megatron-core in turns, on the same micro-batches from memory.

Bare means Megatron-core's schedule, its distributed optimizer, a masked mean loss and nothing else: no global token
counts, no expert load, no guard, no signal check, no metrics file.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_joy.data.batch import Batch, make_batch
from megatron_joy.data.stream import Sample
from megatron_joy.platform.process import Process
from megatron_joy.platform.stop_request import StopRequest
from megatron_joy.recipe import Recipe
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
WARM_UP = 2  # turns beside the measured ones: the first, and the last of the bare loop, which ours doesn't answer


def short_run(pairs: int) -> list[str]:
    """Overrides of a run of so many measured pairs that does nothing but train."""
    steps = pairs + WARM_UP
    quiet = [f"train.steps={steps}", "schedule.warmup_steps=0", "schedule.decay_steps=0", f"train.log_interval={steps}"]
    return [*ONE_PROCESS, *quiet, "train.validation_interval=0"]


class OneSource:
    """Stands for the stream in the metrics row; samples come from memory."""

    def sources_in(self, samples: range) -> dict[str, int]:
        """All of one source."""
        return {"memory": len(samples)}


def batches_in_memory(recipe: Recipe, shortest: int = 20, longest: int = 200) -> list[Batch]:
    """One step's micro-batches of random tokens with documents of `shortest` to `longest` tokens."""
    random = np.random.default_rng(recipe.seed)
    size, length = recipe.train.micro_batch_size, recipe.data.sequence_length

    def sample() -> Sample:
        tokens = random.integers(2, recipe.model.vocab_size, length + 1)
        tokens[np.cumsum(random.integers(shortest, longest, length // shortest)).clip(max=length)] = EOD
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


def now(device: torch.device) -> float:
    """Seconds of the clock once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def of_cpu(device: torch.device) -> float:
    """Seconds of the CPU, all threads of this process: what other processes do meanwhile isn't in it."""
    return time.process_time()


def in_turns(
    trainer: Trainer,
    bare: Trainer,
    batches: Sequence[Batch],
    pairs: int,
    folder: Path,
    now: Callable[[torch.device], float] = now,
) -> tuple[list[float], list[float]]:
    """Seconds of each step of `trainer` in our loop and of each bare step of `bare`, which may be the same trainer.

    The recipe is `short_run(pairs)`. now: which seconds.
    """
    recipe, process = trainer.recipe, trainer.process
    ours: list[float] = []
    theirs: list[float] = []
    run = Run(recipe, process, folder, 0, Progress(), begin(recipe))
    metrics = Metrics(run, OneSource(), None)  # type: ignore[arg-type]
    guard = Guard(Rollback(OneSource(), None))  # type: ignore[arg-type]
    features = [Stopwatch(), StopOnSignal(StopRequest()), Usage(recipe, None), metrics, Terminal(None), guard]
    marks: list[float] = []

    def turns() -> Iterator[Sequence[Batch]]:
        for _ in range(pairs + WARM_UP):
            if marks:
                ours.append(now(process.device) - marks[-1])
            started = now(process.device)
            bare_step(bare, process, batches, recipe)
            marks.append(now(process.device))
            theirs.append(marks[-1] - started)
            yield batches

    train(Loop(run, trainer, features), turns())
    return ours[1:], theirs[1:-1]  # the first pair warms up
