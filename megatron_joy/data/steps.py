"""Which samples a step, a data-parallel rank and a micro-batch take. Steps count from 0 here."""

from dataclasses import dataclass


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


def micro_batch_indices(step: int, shape: BatchShape, data_parallel_rank: int) -> list[list[int]]:
    """The samples of each micro-batch of step `step` (from 0) on a rank: [micro_batches][micro_batch_size].

    A step takes samples step * GBS .. (step + 1) * GBS - 1 whatever the layout; micro-batch m of rank d takes
    step * GBS + (m * DP + d) * MBS + j. Raises ValueError where the sizes do not divide or the rank is none.
    """
    size, ranks = shape.micro_batch_size, shape.data_parallel_size
    if shape.global_batch_size % (size * ranks):
        raise ValueError(f"global batch of {shape.global_batch_size} over {ranks} ranks in micro-batches of {size}")
    if not 0 <= data_parallel_rank < ranks:
        raise ValueError(f"data-parallel rank {data_parallel_rank} of {ranks}")
    first = step * shape.global_batch_size + data_parallel_rank * size
    return [
        list(range(start, start + size)) for start in (first + m * ranks * size for m in range(shape.micro_batches))
    ]
