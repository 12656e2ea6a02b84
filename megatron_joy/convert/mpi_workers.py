"""A conversion by the ranks of an MPI job: rank 0 plans, proves and commits, every other rank makes files.

`mpiexec -n 9 joy convert to-hf CKPT --out DIR --executor mpi` has eight workers, on as many nodes as see both folders.
A rank that is free gets the next file. When a rank dies MPI ends the job; the same command goes on from what is whole.
"""

import pickle
import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from megatron_joy.convert.progress import Advance
from megatron_joy.convert.workers import Call, Crew, Finished, Job, Opener, Pool, nothing
from megatron_joy.platform.mpi import receive, send


def serve(comm: Any) -> None:
    """What every rank but 0 does: file after file, until rank 0 says that there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all ranks; rank 0 decides
    torch.set_num_threads(1)
    job = None
    with ExitStack() as stack:
        while (task := _take(comm)[1]) is not None:
            opener, method, call = task
            try:
                job = job or stack.enter_context(opener())
                done = getattr(job, method)(*call, lambda size: _give(comm, 0, ("advance", size)))
                _give(comm, 0, ("done", done))
            except Exception as error:  # told to rank 0, which raises it
                _give(comm, 0, ("failed", error))


@contextmanager
def crew_of(comm: Any) -> Iterator[Crew]:
    """Rank 0's side: what starts a conversion's pool; when the block ends, however it does, the others are let go."""

    def crew(job: Job, opener: Opener, asked: int | None) -> AbstractContextManager[Pool]:
        return MpiWorkers(comm, opener)

    try:
        yield crew
    finally:
        for rank in range(1, comm.size):
            _give(comm, rank, None)


class MpiWorkers:
    """As `Workers`, over the other ranks of `comm`."""

    def __init__(self, comm: Any, opener: Opener) -> None:
        self.comm, self.opener, self.count = comm, opener, comm.size - 1

    def __enter__(self) -> "MpiWorkers":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def each(self, method: str, calls: Sequence[Call], advance: Advance, finished: Finished = nothing) -> list[Any]:
        """As `Workers.each`; it returns or raises once no rank is at work any more."""
        results: dict[int, Any] = {}
        waiting = list(enumerate(calls))[::-1]
        busy: dict[int, int] = {}
        failed: Exception | None = None
        free = list(range(1, self.comm.size))
        while waiting or busy:
            while free and waiting:
                rank = free.pop()
                busy[rank], call = waiting.pop()
                _give(self.comm, rank, (self.opener, method, call))
            rank, (kind, value) = _take(self.comm)
            if kind == "advance":
                advance(value)
                continue
            free.append(rank)
            done = busy.pop(rank)
            if kind == "failed":
                failed = failed or value
                waiting.clear()
            else:
                results[done] = value
                finished(calls[done][0], value)
        if failed is not None:
            raise failed
        return [results[i] for i in range(len(calls))]


def _give(comm: Any, rank: int, message: Any) -> None:
    send(comm, rank, pickle.dumps(message))


def _take(comm: Any) -> tuple[int, Any]:
    """A message of a rank of the same job: what it unpickles is our own."""
    rank, content = receive(comm)
    return rank, pickle.loads(content)  # noqa: S301
