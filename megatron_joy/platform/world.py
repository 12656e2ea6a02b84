"""Starts a gloo world on this machine's CPU: `run_world(function, world_size, *args)`. Imports no torch itself.

Ranks are forked from a server process that has imported torch and Megatron-core once and done nothing else, so a world
starts in a fraction of a second and inherits no process group, thread or random state of the caller. GPUs are hidden
from it. `function` must be at the top level of a module, and may be named "module:function" so that the caller needn't
import it; arguments and results are pickled, between processes of this machine only.
"""

import ctypes
import faulthandler
import importlib
import multiprocessing
import os
import signal
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

from megatron_joy.errors import UserError, WorkError
from megatron_joy.platform.rendezvous import free_port

PRELOADED = ["torch"] + [
    f"megatron_joy.{name}" for name in ("platform.process", "train.step", "model.backends.portable")
]
START_PATIENCE = 120.0  # seconds for a forked rank to import what its function needs
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)
_to_parent: Connection | None = None  # in a rank only


class WorldFailed(WorkError):
    """A rank raised, died or hung. `rank` is the first one and `error` what it said, in a line.

    `details` has its traceback where there is one, `log` what it printed, `exit_code` is set when it died.
    """

    def __init__(self, rank: int, error: str, log: str, details: str = "", exit_code: int | None = None) -> None:
        super().__init__(f"rank {rank}: {error}")
        self.rank, self.error, self.log, self.details, self.exit_code = rank, error, log, details, exit_code

    @property
    def users_mistake(self) -> bool:
        """Whether what it raised was a UserError."""
        return self.error.startswith(f"{UserError.__name__}: ")


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

    def printed(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@dataclass
class _Started:
    pass


@dataclass
class _Message:
    value: Any


@dataclass
class _Answer:
    value: Any = None
    error: str | None = None
    details: str = ""
    at: float = 0.0


def tell(value: Any) -> None:
    """Hands a value from a rank to the `on_message` of its world; it also says that the rank isn't hanging."""
    if _to_parent is not None:
        _to_parent.send(_Message(value))


def _prepare(rank: int, world_size: int, port: int, log: str, environment: dict[str, str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives the server, nor it the caller
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


def _named(function: Callable[..., Any] | str) -> Callable[..., Any]:
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _rank_main(
    pipe: Connection,
    function: Callable[..., Any] | str,
    args: tuple[Any, ...],
    place: tuple[int, int, int, str],
    environment: dict[str, str],
) -> None:
    global _to_parent
    answer = _Answer()
    try:
        _prepare(*place, environment)
        pipe.send(_Started())
        _to_parent = pipe
        answer.value = _named(function)(*args)
    except BaseException as error:
        answer.error, answer.details = f"{type(error).__name__}: {error}", traceback.format_exc()
    answer.at = time.monotonic()
    try:
        pipe.send(answer)
    except Exception as error:
        pipe.send(_Answer(error=f"its result can't be pickled: {error}", at=answer.at))
    sys.stdout.flush()
    # Rank 0 hosts the store: nobody leaves before all are done.
    pipe.poll(None)
    os._exit(0)


def _hanging(waiting: Sequence[_Rank], patience: float) -> WorldFailed:
    for each in waiting:
        os.kill(each.process.pid or 0, signal.SIGUSR1)
    time.sleep(0.5)
    names = ", ".join(str(each.rank) for each in waiting)
    error = f"still running after {patience:.0f} s without a sign (with it: {names})"
    return WorldFailed(waiting[0].rank, error, waiting[0].printed())


def _death(rank: _Rank) -> WorldFailed:
    rank.process.join()
    code = rank.process.exitcode
    return WorldFailed(rank.rank, f"died with exit code {code}", rank.printed(), exit_code=code)


def _failure(ranks: Sequence[_Rank], answers: dict[int, _Answer]) -> WorldFailed:
    """The error of the rank that failed first; one that died is the cause, since its death makes the others fail."""
    time.sleep(0.3)
    for each in ranks:
        if each.rank not in answers and not each.process.is_alive():
            return _death(each)
    first = min((rank for rank, answer in answers.items() if answer.error), key=lambda rank: answers[rank].at)
    return WorldFailed(first, str(answers[first].error), ranks[first].printed(), answers[first].details)


def _collect(ranks: Sequence[_Rank], patience: float, on_message: Callable[[int, Any], None] | None) -> list[Any]:
    answers: dict[int, _Answer] = {}
    starting = len(ranks)
    deadline = time.monotonic() + max(patience, START_PATIENCE)
    while len(answers) < len(ranks):
        waiting = [each for each in ranks if each.rank not in answers]
        ready = wait([each.pipe for each in waiting], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise _hanging(waiting, patience)
        for each in (each for each in waiting if each.pipe in ready):
            try:
                received = each.pipe.recv()
            except EOFError:
                raise _death(each) from None
            if isinstance(received, _Answer):
                answers[each.rank] = received
                continue
            starting -= isinstance(received, _Started)
            if starting == 0:
                deadline = time.monotonic() + patience
            if isinstance(received, _Message) and on_message is not None:
                on_message(each.rank, received.value)
        if any(answer.error for answer in answers.values()):
            raise _failure(ranks, answers)
    return [answers[each.rank].value for each in ranks]


def _nothing() -> None:
    pass


@cache
def warm_up() -> None:
    """Starts the server and waits until it has imported everything, which no time limit should have to cover."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        process = _context.Process(target=_nothing)
        process.start()
        process.join()
    finally:
        if visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def run_world(
    function: Callable[..., Any] | str,
    world_size: int,
    *args: Any,
    patience: float = 120.0,
    environment: dict[str, str] | None = None,
    log_folder: Path | None = None,
    on_message: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """Calls `function(*args)` on each of `world_size` ranks, ready for `platform.process.start`; results in rank order.

    Each rank has one thread, `RANK` and its like, what `environment` adds, and a log `rank_N.log` in `log_folder`.
    Raises WorldFailed for the first rank that raises, dies, or is not done when `patience` seconds have passed since
    all had started and the last `tell` of any rank. However it ends, no rank is left.
    """
    warm_up()
    with tempfile.TemporaryDirectory() as scratch:
        folder, port = log_folder or Path(scratch), free_port()
        folder.mkdir(parents=True, exist_ok=True)
        ranks: list[_Rank] = []
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
            values = _collect(ranks, patience, on_message)
            for each in ranks:
                each.pipe.send(None)
            for each in ranks:
                each.process.join(10)
            return values
        finally:
            for each in ranks:
                each.kill()
