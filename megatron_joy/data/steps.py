"""Which samples a step, a data-parallel rank and a micro-batch take. Steps count from 0 here."""

from dataclasses import dataclass

from megatron_joy.recipe.ledger import Ledger, first_sample
from megatron_joy.recipe.timetable import Timetable


@dataclass(frozen=True)
class BatchShape:
    """How a step's samples are dealt out. Sizes in samples; the recipe's validation holds that they divide."""

    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)


def deal(first: int, shape: BatchShape, data_parallel_rank: int) -> list[list[int]]:
    """The samples of each micro-batch of a step on a rank: [micro_batches][micro_batch_size].

    The step takes samples first .. first + GBS - 1 whatever the layout; micro-batch m of rank d takes
    first + (m * DP + d) * MBS + j. Raises ValueError where the sizes do not divide or the rank is none.
    """
    size, ranks = shape.micro_batch_size, shape.data_parallel_size
    if shape.global_batch_size % (size * ranks):
        raise ValueError(f"global batch of {shape.global_batch_size} over {ranks} ranks in micro-batches of {size}")
    if not 0 <= data_parallel_rank < ranks:
        raise ValueError(f"data-parallel rank {data_parallel_rank} of {ranks}")
    mine = first + data_parallel_rank * size
    return [list(range(start, start + size)) for start in (mine + m * ranks * size for m in range(shape.micro_batches))]


def micro_batch_indices(step: int, shape: BatchShape, data_parallel_rank: int) -> list[list[int]]:
    """`deal` where all steps have one shape: step `step` (from 0) begins at sample step * GBS."""
    return deal(step * shape.global_batch_size, shape, data_parallel_rank)


def planned_indices(
    step: int, timetable: Timetable, ledger: Ledger, data_parallel_size: int, data_parallel_rank: int
) -> list[list[int]]:
    """`deal` for step `step` (from 0) of a run's timetable and ledger."""
    plan = timetable.at(step + 1)
    shape = BatchShape(plan.global_batch_size, plan.stage.micro_batch_size, data_parallel_size)
    return deal(first_sample(ledger, timetable, step + 1), shape, data_parallel_rank)
