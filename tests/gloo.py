"""Starts gloo worlds for tests: `run_world(function, world_size, *args)`. The one place where tests start ranks.

Ranks are forked from a server process that has imported torch and Megatron-core once and done nothing else, so a world
starts in a fraction of a second and inherits no process group, thread or random state of the test process. `function`
must be at the top level of a module; it and its arguments and results are pickled.
"""

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = ["torch", "megatron_joy.platform.process", "megatron_joy.model.build", "megatron_joy.optim.build"]
LOG_TAIL = 3000  # characters of a rank's log in an error
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


class WorldFailed(AssertionError):
    """A rank raised, died or ran out of time. `rank` is the first one, `error` what it said, `exit_code` if it died."""

    def __init__(self, rank: int, error: str, log: str, exit_code: int | None = None) -> None:
        super().__init__(f"rank {rank}: {error}\n--- end of its log ---\n{log[-LOG_TAIL:]}")
        self.rank, self.error, self.exit_code = rank, error, exit_code


@dataclass
class _Rank:
    rank: int
    process: BaseProcess
    pipe: Connection
    log: Path

    def kill(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.pipe.close()


@dataclass
class _Answer:
    rank: int
    value: Any = None
    error: str | None = None
    at: float = 0.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _prepare(rank: int, world_size: int, port: int, log: str, environment: dict[str, str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives the tests
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the parent asks for a traceback before it kills a rank that hangs
    own = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in own.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", **environment)
    import torch

    torch.set_num_threads(1)


def _rank_main(
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    place: tuple[int, int, int, str],
    environment: dict[str, str],
) -> None:
    rank, answer = place[0], _Answer(place[0])
    try:
        _prepare(*place, environment)
        answer.value = function(*args)
    except BaseException as error:
        answer.error = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    answer.at = time.monotonic()
    try:
        pipe.send(answer)
    except Exception as error:
        pipe.send(_Answer(rank, error=f"its result can't be pickled: {error}", at=answer.at))
    sys.stdout.flush()
    # Rank 0 hosts the store: nobody leaves before all are done.
    pipe.poll(None)
    os._exit(0)


def _collect(ranks: Sequence[_Rank], timeout: float) -> list[Any]:
    answers: dict[int, _Answer] = {}
    deadline = time.monotonic() + timeout
    while len(answers) < len(ranks):
        waiting = [r for r in ranks if r.rank not in answers]
        ready = wait([r.pipe for r in waiting], max(0.0, deadline - time.monotonic()))
        if not ready:
            late = waiting[0]
            for each in waiting:
                os.kill(each.process.pid or 0, signal.SIGUSR1)
            time.sleep(0.5)
            names = ", ".join(str(r.rank) for r in waiting)
            raise WorldFailed(late.rank, f"still running after {timeout:.0f} s (with it: {names})", _tail(late))
        for each in (r for r in waiting if r.pipe in ready):
            try:
                answers[each.rank] = each.pipe.recv()
            except EOFError:
                raise _death(each) from None
        failed = [a for a in answers.values() if a.error]
        if failed:
            time.sleep(0.3)  # a rank that died makes the others fail: if there is one, it is the cause
            for each in ranks:
                if each.rank not in answers and not each.process.is_alive():
                    raise _death(each)
            first = min(failed, key=lambda a: a.at)
            raise WorldFailed(first.rank, str(first.error), _tail(ranks[first.rank]))
    return [answers[r.rank].value for r in ranks]


def _death(rank: _Rank) -> WorldFailed:
    rank.process.join()
    code = rank.process.exitcode
    return WorldFailed(rank.rank, f"died with exit code {code}", _tail(rank), code)


def _tail(rank: _Rank) -> str:
    return rank.log.read_text(errors="replace") if rank.log.exists() else ""


def _nothing() -> None:
    pass


@cache
def _warm_up() -> None:
    """Waits until the server has imported everything, which no test's time limit should have to cover."""
    process = _context.Process(target=_nothing)
    process.start()
    process.join()


def run_world(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    environment: dict[str, str] | None = None,
    log_folder: Path | None = None,
) -> list[Any]:
    """Calls `function(*args)` on each of `world_size` ranks, ready for `platform.process.start`; results in rank order.

    Each rank has one thread, `RANK` and its like, what `environment` adds, and a log `rank_N.log` in `log_folder`.
    Raises WorldFailed for the first rank that raises, dies or hasn't finished after `timeout` seconds; all are killed.
    """
    _warm_up()
    with tempfile.TemporaryDirectory() as scratch:
        folder, port = log_folder or Path(scratch), _free_port()
        folder.mkdir(parents=True, exist_ok=True)
        ranks = []
        try:
            for rank in range(world_size):
                ours, theirs = _context.Pipe()
                log = folder / f"rank_{rank}.log"
                place = (rank, world_size, port, str(log))
                process = _context.Process(
                    target=_rank_main, args=(theirs, function, args, place, environment or {}), daemon=True
                )
                process.start()
                theirs.close()
                ranks.append(_Rank(rank, process, ours, log))
            values = _collect(ranks, timeout)
            for each in ranks:
                each.pipe.send(None)
            for each in ranks:
                each.process.join(10)
            return values
        finally:
            for each in ranks:
                each.kill()
