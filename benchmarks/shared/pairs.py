"""Two forms that take turns: what one costs of the other, whatever the machine does in between."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Seconds(NamedTuple):
    """By the clock, and of the CPU by all threads of this process: the second doesn't wait for others' processes."""

    clock: float
    cpu: float


def timed(call: Callable[[], object]) -> Seconds:
    """What a call takes."""
    clock, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - clock, time.process_time() - cpu)


def compared(above: Sequence[Seconds], below: Sequence[Seconds], over: str, under: str) -> dict[str, Any]:
    """Medians of both, and the median, first and third quartile of the pairs' ratios, by the clock and of the CPU."""
    told: dict[str, Any] = {}
    for kind in Seconds._fields:
        first, second = ([getattr(one, kind) for one in some] for some in (above, below))
        found = [a / b for a, b in zip(first, second, strict=True)]
        low, _, high = statistics.quantiles(found, n=4)
        told |= {
            f"{over}_{kind}_seconds": round(statistics.median(first), 3),
            f"{under}_{kind}_seconds": round(statistics.median(second), 3),
            f"{over}_over_{under}_{kind}": round(statistics.median(found), 3),
            f"{over}_over_{under}_{kind}_quartiles": [round(low, 3), round(high, 3)],
        }
    return told
