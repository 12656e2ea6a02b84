"""What a task cost is what it used: a peak is that of its own task, not of the largest before it."""

import numpy as np

from data_pipeline.cost import Stopwatch


def peak_of(megabytes: int) -> float:
    """The peak of a task that fills so much memory, in megabytes."""
    stopwatch = Stopwatch()
    np.ones(megabytes * 125_000).sum()
    return stopwatch.cost(0)["peak_bytes"] / 1e6


def test_a_peak_is_of_its_own_task() -> None:
    nothing, large, small = peak_of(0), peak_of(400), peak_of(100)
    assert large - nothing > 350
    assert 70 < small - nothing < 250
