"""Tells the one whom the recipe names of a run's start, end and alarms (run.notify)."""

import os
import socket
from typing import Any

from megatron_joy.recipe.schema import NotifySection
from megatron_joy.report.notify import Message, Notifier
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.run import Run
from megatron_joy.train.step import StepResult


class Notify(Feature):
    """On every rank: all is said by rank 0 but an error, which the first rank that fails says."""

    def __init__(self, settings: NotifySection) -> None:
        self.notifier = Notifier(settings)

    def _send(self, run: Run, kind: str, message: str) -> None:
        told = Message(kind, run.recipe.name, run.progress.step, message, socket.gethostname())
        self.notifier.send(told)

    def on_start(self, loop: Loop) -> None:
        """Says where the attempt begins and where its folder is."""
        if loop.run.process.is_first_rank:
            self._send(loop.run, "start", f"attempt {loop.run.attempt} in {loop.run.folder}")

    def on_decision(self, loop: Loop, kind: str, message: str, **extra: Any) -> None:
        """A guard's decision is an alarm."""
        if loop.run.process.is_first_rank:
            self._send(loop.run, "alarm", f"{kind}: {message}")

    def on_alarm(self, loop: Loop, message: str) -> None:
        """Whoever raised it, on whichever rank."""
        self._send(loop.run, "alarm", message)

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Notes messages that could not be delivered."""
        for problem in self.notifier.problems():
            loop.tell("on_note", problem)

    def on_finish(self, loop: Loop) -> None:
        """Says how the attempt ended."""
        if loop.run.process.is_first_rank:
            kind, message = ("finish", "all steps done") if loop.done else ("stop", "stopped as asked")
            self._send(loop.run, kind, message)

    def on_error(self, run: Run, error: BaseException) -> None:
        """What the first failing rank of the attempt says; the others fail because of it."""
        first = run.folder / "logs" / f".error_notified_{run.attempt}"
        try:
            os.close(os.open(first, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return
        except OSError:
            pass  # a full disk: better said twice than not at all
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self._send(run, "error", f"rank {run.process.info.rank}: {text[:1000]}")

    def close(self) -> None:
        """Gives messages on their way `timeout_seconds`."""
        self.notifier.close()
