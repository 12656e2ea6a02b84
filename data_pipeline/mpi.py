"""The MPI executor: rank 0 plans and hands out tasks one by one, every other rank is a worker.

`mpiexec -n 9 joy data run PIPELINE.toml --executor mpi` has eight workers. A rank that is free gets the next task, so
a slow one holds up nobody. Messages are JSON: a task, or nothing, which ends the worker. Waiting ranks sleep between
looks for a message: MPI itself keeps a core busy meanwhile. When a rank dies MPI ends the job; the next one goes on.
"""

import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from data_pipeline.pool import Answer, raise_failure
from data_pipeline.worker import attempt, open_engine
from megatron_joy.errors import UserError

TAG = 7
NAP_S = 0.005


def world() -> Any:
    """MPI's world. Raises UserError where mpi4py or an MPI library is missing, or only one rank was started."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise UserError(
            f"--executor mpi: mpi4py cannot be loaded ({line}); pip install 'megatron-joy[mpi]', or mpi4py for your MPI"
        ) from None
    if MPI.COMM_WORLD.size < 2:
        raise UserError(
            "--executor mpi: one rank only, expected one that hands out tasks and others that do them; start it as "
            "`mpiexec -n 9 joy data run PIPELINE.toml --executor mpi` (or srun)"
        )
    return MPI.COMM_WORLD


def _send(comm: Any, rank: int, message: Any) -> None:
    comm.Send(orjson.dumps(message), dest=rank, tag=TAG)


def _receive(comm: Any) -> tuple[int, Any]:
    """The next message from any rank, and which rank that was."""
    from mpi4py import MPI

    status = MPI.Status()
    while not comm.Iprobe(source=MPI.ANY_SOURCE, tag=TAG, status=status):
        time.sleep(NAP_S)
    content = bytearray(status.Get_count(MPI.BYTE))
    comm.Recv(content, source=status.Get_source(), tag=TAG)
    return status.Get_source(), orjson.loads(content)


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
