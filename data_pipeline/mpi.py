"""The MPI executor: rank 0 plans and hands out tasks one by one, every other rank is a worker.

`mpiexec -n 9 joy data run PIPELINE.toml --executor mpi` has eight workers. A rank that is free gets the next task, so
a slow one holds up nobody. Messages are JSON: a task, or nothing, which ends the worker. When a rank dies MPI ends the
job; the next one goes on.
"""

import signal
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from data_pipeline.pool import Answer, raise_failure
from data_pipeline.worker import attempt, open_engine
from megatron_joy.platform import mpi


def world() -> Any:
    """MPI's world. Raises UserError where there is none, or only one rank was started."""
    return mpi.world("joy data run PIPELINE.toml")


def _send(comm: Any, rank: int, message: Any) -> None:
    mpi.send(comm, rank, orjson.dumps(message))


def _receive(comm: Any) -> tuple[int, Any]:
    rank, content = mpi.receive(comm)
    return rank, orjson.loads(content)


def serve(comm: Any, pipeline: str, overrides: Sequence[str]) -> None:
    """What every rank but 0 does: task after task, until rank 0 says that there are no more."""
    # Ctrl-C goes to all ranks: rank 0 decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine = None
    while (task := _receive(comm)[1]) is not None:
        # Rank 0 has written the plan by the time of the first task, not before.
        engine = engine or open_engine(pipeline, overrides)
        _send(comm, 0, attempt(engine, *task))


class MpiPool:
    """Rank 0's side."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._busy = 0

    def run(self, stage: str, shards: Sequence[int], on_done: Callable[[Answer], None]) -> None:
        """As Pool.run; it returns or raises once no task is being done any more."""
        waiting = list(reversed(shards))
        failed: Answer | None = None
        for rank in range(1, self._comm.size):
            self._give(rank, stage, waiting)
        while self._busy:
            rank, answer = _receive(self._comm)
            self._busy -= 1
            if answer["kind"] == "done":
                on_done(answer)
            else:
                failed = failed or answer
                waiting.clear()
            self._give(rank, stage, waiting)
        if failed is not None:
            raise_failure(failed)

    def _give(self, rank: int, stage: str, waiting: list[int]) -> None:
        if waiting:
            _send(self._comm, rank, [stage, waiting.pop()])
            self._busy += 1

    def close(self, kill: bool = False) -> None:
        """Tell every worker that there are no more tasks; a worker ends its present one first."""
        for rank in range(1, self._comm.size):
            _send(self._comm, rank, None)
