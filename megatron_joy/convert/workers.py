"""The files of a conversion made by several processes; which one makes a file decides nothing about its bytes."""

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from megatron_joy.checkpoint.work_folder import Stopped
from megatron_joy.convert.progress import Advance
from megatron_joy.errors import UserError

Opener = Callable[[], AbstractContextManager[Any]]  # can be pickled; opens the job anew in a worker
Call = tuple[Any, ...]
Finished = Callable[[Any, Any], None]


class Job(Protocol):
    """What is converted."""

    files: Any  # sized: what is made of each

    @property
    def bytes(self) -> int: ...


class Pool(Protocol):
    """What calls methods of a job, somewhere."""

    count: int

    def each(self, method: str, calls: Sequence[Call], advance: Advance, finished: Finished = ...) -> list[Any]: ...


# A job, what opens it in a worker, and how many workers were asked for. Raises UserError for a number without meaning.
Crew = Callable[[Any, Opener, int | None], AbstractContextManager[Pool]]
_SMALL = 2_000_000_000  # bytes below which starting a process costs more than it saves
_MOST = 4  # without being asked for; more rarely help one disk


def workers_for(asked: int | None, files: int, size: int) -> int:
    """How many processes: as many as asked for, else by files, their bytes and CPUs. Raises UserError below 1."""
    if asked is not None and asked < 1:
        raise UserError(f"--workers {asked}: expected at least 1")
    wanted = asked or (1 if size < _SMALL else min(_MOST, len(os.sched_getaffinity(0))))
    return max(1, min(wanted, files))


def nothing(name: Any, result: Any) -> None:
    """For a caller who needs no word of what is finished."""


def processes(job: Job, opener: Opener, asked: int | None) -> "Workers":
    """The crew of one machine."""
    return Workers(job, opener, workers_for(asked, len(job.files), job.bytes))


class Workers:
    """Calls methods of a job: in this process when `count` is 1, else in processes that opened the job themselves.

    A method gets its call's arguments and, last, what is to be told the bytes done. The first error ends all workers.
    """

    def __init__(self, job: Any, opener: Opener, count: int) -> None:
        self.job, self.opener, self.count = job, opener, count
        self._workers: dict[Connection, Any] = {}
        self._threads = 1

    def __enter__(self) -> "Workers":
        self._threads = torch.get_num_threads()
        torch.set_num_threads(
            1
        )  # of matrices this small threads of torch's own wait for each other more than they work
        context = get_context("spawn")  # torch's threads don't survive a fork
        for _ in range(self.count if self.count > 1 else 0):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self.opener), daemon=True)
            process.start()
            theirs.close()
            self._workers[ours] = process
        return self

    def __exit__(self, *exc: object) -> None:
        torch.set_num_threads(self._threads)
        for connection, process in self._workers.items():
            process.kill()
            process.join()
            connection.close()

    def each(self, method: str, calls: Sequence[Call], advance: Advance, finished: Finished = nothing) -> list[Any]:
        """The results in the calls' order; `finished` gets each call's first argument and result when it is there.

        Raises the first error of any, Stopped when a worker was killed.
        """
        results: dict[int, Any] = {}
        if not self._workers:
            for i, call in enumerate(calls):
                results[i] = getattr(self.job, method)(*call, advance)
                finished(call[0], results[i])
        waiting = list(enumerate(calls))[::-1]
        busy: dict[Connection, int] = {}
        while len(results) < len(calls):
            for connection in self._workers.keys() - busy.keys():
                if waiting:
                    busy[connection], call = waiting.pop()
                    connection.send((method, call))
            for connection in [connection for connection in wait(list(busy)) if isinstance(connection, Connection)]:
                kind, value = self._receive(connection)
                if kind == "failed":
                    raise value
                if kind == "advance":
                    advance(value)
                else:
                    done = busy.pop(connection)
                    results[done] = value
                    finished(calls[done][0], value)
        return [results[i] for i in range(len(calls))]

    def _receive(self, connection: Connection) -> tuple[str, Any]:
        try:
            kind, value = connection.recv()
        except (EOFError, OSError):
            process = self._workers[connection]
            process.join()
            raise Stopped(
                f"a worker ended with exit code {process.exitcode} (killed, maybe for want of memory); the same "
                "command goes on from what is finished"
            ) from None
        return kind, value


def _serve(connection: Connection, opener: Opener) -> None:
    """A worker: takes calls until its parent is gone, which it notices at the next message at the latest."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    torch.set_num_threads(1)
    try:
        with opener() as job:
            while True:
                method, call = connection.recv()
                try:
                    done = getattr(job, method)(*call, lambda size: connection.send(("advance", size)))
                    connection.send(("done", done))
                except (BrokenPipeError, EOFError):
                    raise
                except Exception as error:  # told to the parent, which raises it
                    connection.send(("failed", error))
    except (BrokenPipeError, EOFError, ConnectionResetError):
        return
