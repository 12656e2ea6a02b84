"""What a checkpoint costs the steps of a run: written beside training, and before the next step.

One model trains from memory, in cycles: some steps with nothing on its way, then a save beside training and steps until
it is committed. A machine that others use changes its pace within minutes: each step beside a save is also divided by
the mean of those alone just before and after its save. At the end one synchronous save of the same state.

    python benchmarks/checkpoint_stall.py [--recipe joyai_mini] [--cycles 5] [--plain 6] [--threads 1] [k=v ...]

prints one JSON object; three figures are quartiles, two the bounds of a median. On a CPU the thread that writes takes
its share of the cores that compute; with fewer threads than cores it has one for itself, as on a machine whose GPUs
compute. The promise is a ratio of at most 1.05. With one thread, seconds of CPU of the thread that computes tell more
than the clock's where others use the machine too; what they can't tell is waiting, for Python's lock or for a core.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from shared.turns import ONE_PROCESS, batches_in_memory

from megatron_joy.checkpoint import background
from megatron_joy.checkpoint.background import BackgroundSaver, Outcome
from megatron_joy.checkpoint.save import Save, save_checkpoint
from megatron_joy.model.build import build_model
from megatron_joy.platform import process as processes
from megatron_joy.recipe import load_recipe
from megatron_joy.train.step import Trainer

# A step of some seconds on a CPU: many of them fall into the writing of one checkpoint, as in a real run.
SMALL_STEPS = ("data.sequence_length=512", "train.global_batch_size=2", "train.micro_batch_size=1")


class Seconds(NamedTuple):
    """By the clock; without those in which the thread could have run and another had its core; of the CPU."""

    clock: float
    unqueued: float
    cpu: float


def now() -> Seconds:
    """What the calling thread has had so far. Linux tells how long a thread waited for a core."""
    schedstat = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    queued = int(schedstat.read_text().split()[1]) / 1e9 if schedstat.exists() else 0.0
    clock = time.perf_counter()
    return Seconds(clock, clock - queued, time.thread_time())


def since(began: Seconds) -> Seconds:
    """From then until now."""
    return Seconds(*(after - before for after, before in zip(now(), began, strict=True)))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The cycles and the synchronous save."""
    quiet = [f"train.steps={10**6}", "train.validation_interval=0"]
    recipe = load_recipe(arguments.recipe, [*ONE_PROCESS, *SMALL_STEPS, *quiet, *arguments.overrides])
    torch.set_num_threads(arguments.threads)
    process = processes.start(recipe.layout, recipe.seed)
    trainer = Trainer(recipe, process, build_model(recipe, process))
    batches, number = batches_in_memory(recipe), 0
    saver, outcomes = BackgroundSaver(process), list[Outcome]()
    alone, beside = list[list[Seconds]](), list[list[Seconds]]()
    copying: list[float] = []
    writing = time_the_writer()

    def step() -> Seconds:
        nonlocal number
        number += 1
        began = now()
        trainer.step(number, batches)
        return since(began)

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        save = Save(Path(folder), 1, 0, recipe, process, {})
        for _ in range(2):
            step()  # the first ones warm up
        for _ in range(arguments.cycles):
            alone.append([step() for _ in range(arguments.plain)])
            cpu = time.thread_time()
            saver.begin(save, trainer.chunks, trainer.optimizer, list)
            copying.append(time.thread_time() - cpu)
            beside.append([])
            outcome = None
            while outcome is None:
                beside[-1].append(step())
                outcome = saver.poll()
            assert outcome.failure is None, outcome.failure
            outcomes.append(outcome)
        alone.append([step()])
        saver.close()
        started = time.perf_counter()
        about = {"recipe": recipe, "chunks": trainer.chunks, "optimizer": trainer.optimizer, "process": process}
        path = save_checkpoint(Path(folder), 1, state={}, **about)
        synchronous = time.perf_counter() - started
        size = sum(file.stat().st_size for file in path.iterdir())
    processes.stop()
    return figures(alone, beside, outcomes) | {
        "copy_cpu_seconds": of_later_saves(copying),
        **{
            f"writer_{kind}_seconds": round(statistics.median(values), 3)
            for kind, values in zip(Seconds._fields, zip(*writing, strict=True), strict=True)
        },
        "recipe": recipe.name,
        "threads": arguments.threads,
        "megabytes": round(size / 1e6),
        "synchronous_seconds": round(synchronous, 2),
        "torch": torch.__version__,
    }


def time_the_writer() -> list[Seconds]:
    """What the thread needs to hash, write and sync a file, one entry a save as they come."""
    write, seconds = background.write_image, list[Seconds]()

    def timed(*arguments: Any) -> Any:
        began = now()
        written = write(*arguments)
        seconds.append(since(began))
        return written

    background.write_image = timed
    return seconds


def of_later_saves(seconds: Sequence[float]) -> float | None:
    """Median without the first save, which makes the buffers; None where it was the only one."""
    return round(statistics.median(seconds[1:]), 3) if len(seconds) > 1 else None


def figures(alone: list[list[Seconds]], beside: list[list[Seconds]], outcomes: list[Outcome]) -> dict[str, Any]:
    """Medians; the first save, which makes the image, apart from the others. `alone` has one cycle more, the last."""
    told: dict[str, Any] = {"steps_alone": sum(map(len, alone)), "steps_beside": sum(map(len, beside))}
    for kind in Seconds._fields:
        without, within = ([[getattr(step, kind) for step in cycle] for cycle in cycles] for cycles in (alone, beside))
        around = [(before[-1] + after[0]) / 2 for before, after in itertools.pairwise(without)]
        ratios = [[seconds / mean for seconds in cycle] for cycle, mean in zip(within, around, strict=True)]
        expected = [[mean] * len(cycle) for cycle, mean in zip(within, around, strict=True)]
        told |= {
            f"{kind}_alone": quartiles(itertools.chain(*without)),
            f"{kind}_beside": quartiles(itertools.chain(*within)),
            f"{kind}_ratio": quartiles(itertools.chain(*ratios)),
            f"{kind}_ratio_of_first_steps": quartiles(cycle[0] for cycle in ratios),
            f"{kind}_ratio_95_percent": confidence(list(itertools.chain(*ratios))),
            f"{kind}_ratio_of_sums": round(sum(map(sum, within)) / sum(map(sum, expected)), 3),
        }
    return told | {
        "clock_ratio_of_first_steps_with_the_wait": with_the_wait(alone, beside, outcomes),
        "first_waited_seconds": round(outcomes[0].waited, 3),
        "waited_seconds": of_later_saves([one.waited for one in outcomes]),
        "seconds_to_commit": round(statistics.median(one.seconds for one in outcomes), 2),
    }


def with_the_wait(alone: list[list[Seconds]], beside: list[list[Seconds]], outcomes: list[Outcome]) -> list[float]:
    """The step that begins with the copy, by the clock, of those around it; later saves than the first."""
    around = [(before[-1].clock + after[0].clock) / 2 for before, after in itertools.pairwise(alone)]
    steps = zip(beside, outcomes, around, strict=True)
    return quartiles([(cycle[0].clock + outcome.waited) / mean for cycle, outcome, mean in steps][1:])


def quartiles(values: Iterable[float]) -> list[float]:
    """First, median, third."""
    return [round(value, 3) for value in statistics.quantiles(values, n=4, method="inclusive")]


def confidence(values: Sequence[float]) -> list[float]:
    """Between which order statistics the median lies with 95 % (binomial, in its normal approximation)."""
    ordered, reach = sorted(values), 0.98 * len(values) ** 0.5
    low = max(0, math.floor(len(values) / 2 - reach))
    return [round(value, 3) for value in (ordered[low], ordered[len(values) - 1 - low])]


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
