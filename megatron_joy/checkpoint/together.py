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


def to_first[T](action: Callable[[], T]) -> list[T] | None:
    """Calls `action` on every rank; rank 0 gets all results in rank order, the others None.

    For results of which other ranks have no need: `together` would hand each to all. Raises as `together` does.
    """
    first = dist.get_rank() == 0
    mine: tuple[Any, str | None] = (None, None)
    try:
        mine = (action(), None)
    except Exception as error:
        mine = (None, one_line(error))
    answers: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(mine, answers)
    told: list[Any] = [{rank: failure for rank, (_, failure) in enumerate(answers or []) if failure is not None}]
    dist.broadcast_object_list(told)
    if told[0]:
        raise RanksFailed(told[0])
    return None if answers is None else [value for value, _ in answers]


def from_first[T](action: Callable[[], list[T]]) -> T:
    """Calls `action` on rank 0, which makes a result for each rank, and returns this rank's.

    Raises RanksFailed on all ranks if it raised.
    """
    answers: list[tuple[Any, str | None]] | None = None
    if dist.get_rank() == 0:
        try:
            answers = [(value, None) for value in action()]
        except Exception as error:
            answers = [(None, one_line(error))] * dist.get_world_size()
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, answers)
    value, failure = mine[0]
    if failure is not None:
        raise RanksFailed({0: failure})
    return value
