"""Work that all ranks do and whose failure all ranks learn of, so that none waits for one that has given up."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException


class RanksFailed(Exception):
    """Some rank's part failed; raised on all ranks with the same text, which names the first one and its reason."""

    def __init__(self, failures: dict[int, str]) -> None:
        rank = min(failures)
        more = f" (and on {len(failures) - 1} more)" if len(failures) > 1 else ""
        super().__init__(f"rank {rank}: {failures[rank]}{more}")


def one_line(error: BaseException) -> str:
    """An exception as one line; a disk's own words without Python's class name."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f" ({error.filename})" if error.filename else "")
    return " ".join(f"{type(error).__name__}: {error}".split())


def together[T](action: Callable[[], T]) -> list[T]:
    """Calls `action` on every rank and returns all results in rank order.

    Raises RanksFailed on all ranks if it raised on any. `action` itself must not communicate.
    """
    try:
        mine: tuple[Any, str | None] = (action(), None)
    except CheckpointException as error:  # torch's wrapping of this rank's own
        mine = (None, one_line(next(iter(error.failures.values()))[0]))
    except Exception as error:
        mine = (None, one_line(error))
    answers: list[tuple[T, str | None]] = [mine] * dist.get_world_size()
    dist.all_gather_object(answers, mine)
    failures = {rank: failure for rank, (_, failure) in enumerate(answers) if failure is not None}
    if failures:
        raise RanksFailed(failures)
    return [value for value, _ in answers]


def each[T](action: Callable[[], T]) -> T:
    """`together` for results that are of no use to other ranks: returns this rank's own, whatever it is."""
    mine: list[T] = []
    together(lambda: mine.append(action()))
    return mine[0]
