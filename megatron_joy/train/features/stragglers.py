"""Which rank is slow, and in what: each rank's own times, gathered now and then."""

import time
from collections.abc import Sequence
from statistics import median_low

import torch
import torch.distributed as dist

from megatron_joy.data.batch import Batch
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.step import Computed, StepResult

PHASES = ("data", "forward_backward", "reduction", "optimizer")
WORDS = {"data": "waiting for data", "forward_backward": "forward and backward", "optimizer": "the optimizer"}
SAMPLED = 8  # updates before each look that are timed
LEAST = 0.02  # of a step: what is slow but so short holds nobody up


class Stragglers(Feature):
    """Comes right after the stopwatch, so that what other features do after a step is not counted.

    The reduction of gradients waits for the last rank, so the slow one has the shortest: it is told and not judged. On
    a GPU the timed updates wait for the device at each border; others don't.
    """

    def __init__(self, interval: int, factor: float) -> None:
        self.interval, self.factor = interval, factor
        self._marks: list[float] = []
        self._seconds = [0.0] * len(PHASES)
        self._timed = 0
        self._told: set[tuple[int, str]] = set()

    def _sampled(self, loop: Loop) -> bool:
        return -loop.plan.number % self.interval < SAMPLED

    def _mark(self, loop: Loop) -> None:
        if not self._sampled(loop):
            return
        if loop.run.process.device.type == "cuda":
            torch.cuda.synchronize()
        self._marks.append(time.perf_counter())

    def before_step(self, loop: Loop) -> None:
        """The wait for data begins."""
        self._marks = []
        self._mark(loop)

    def before_forward(self, loop: Loop, batches: Sequence[Batch]) -> None:
        """Forward and backward begin."""
        self._mark(loop)

    def before_reduction(self, loop: Loop) -> None:
        """The reduction begins."""
        self._mark(loop)

    def after_backward(self, loop: Loop, computed: Computed) -> None:
        """The optimizer begins."""
        self._mark(loop)

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Adds the step's times up and, when due, looks at all ranks'."""
        self._mark(loop)
        if len(self._marks) == len(PHASES) + 1:
            for phase in range(len(PHASES)):
                self._seconds[phase] += self._marks[phase + 1] - self._marks[phase]
            self._timed += 1
        if loop.plan.number % self.interval == 0 and self._timed:
            self._look(loop)
            self._seconds, self._timed = [0.0] * len(PHASES), 0

    def _look(self, loop: Loop) -> None:
        process = loop.run.process
        mine = torch.tensor(self._seconds, dtype=torch.float64, device=process.device) / self._timed
        all_ranks = [torch.empty_like(mine) for _ in range(process.info.world_size)]
        dist.all_gather(all_ranks, mine)
        table = torch.stack(all_ranks).tolist()
        slow = slow_ranks(table, self.factor)
        loop.row["rank_seconds"] = {phase: [row[i] for row in table] for i, phase in enumerate(PHASES)}
        loop.row["slow_ranks"] = [[rank, phase] for rank, phase in slow]
        for rank, phase in slow:
            if (rank, phase) not in self._told:  # a machine that stays slow is told once
                column = [row[PHASES.index(phase)] for row in table]
                message = (
                    f"rank {rank} is slow in {WORDS[phase]}: {column[rank]:.3g} s a step, the median of all ranks is "
                    f"{median_low(column):.3g} s"
                )
                loop.tell("on_decision", "straggler", message, rank=rank, phase=phase)
        self._told = set(slow)


def slow_ranks(table: Sequence[Sequence[float]], factor: float) -> list[tuple[int, str]]:
    """(rank, phase) of each that takes over `factor` times the median of all ranks, by at least LEAST of a step's time.

    table: [ranks][PHASES] mean seconds of a step. Of an even number of ranks the lower median counts.
    """
    step = max(map(sum, table))
    found = []
    for i, phase in enumerate(PHASES):
        middle = median_low(row[i] for row in table)
        found += [
            (rank, phase)
            for rank, row in enumerate(table)
            if phase in WORDS and row[i] > factor * middle and row[i] - middle > LEAST * step
        ]
    return sorted(found)
