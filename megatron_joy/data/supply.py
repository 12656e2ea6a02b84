"""A run's batches in the order in which its updates are made: ahead, and anew from an earlier update."""

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from megatron_joy.data.batch import Batch, BatchLoader


class Supply:
    """The micro-batches of each step for one data-parallel rank, as an iterator.

    open_at: a loader from a step on (from 0). Use it as a context manager.
    """

    def __init__(self, open_at: Callable[[int], BatchLoader], step: int) -> None:
        self._open_at = open_at
        self._loader: BatchLoader | None = open_at(step)

    def stop(self) -> None:
        """Nothing is read any more, until `restart`; may be called twice."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def restart(self, step: int) -> None:
        """Goes on with step `step` (from 0)."""
        self.stop()
        self._loader = self._open_at(step)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._loader is None:
            raise StopIteration
        return next(self._loader)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
