"""Brings a run to its end: starts its ranks, watches them, and does what the policy says when they have ended.

The same for ranks on this machine and under Slurm, which differ in how ranks are started, asked and ended (`Ranks`) and
in what there is to go to besides this allocation (`Place`). Standard library only: under Slurm it runs on the batch
host, where nothing else may be installed.
"""

import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

from launch.policy import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_HOPELESS,
    EXIT_STOPPED,
    EXIT_USER_MISTAKE,
    FIRST_WAIT_SECONDS,
    Action,
    Attempt,
    Decision,
    Ended,
    Outcome,
    decide,
    judge,
)
from launch.stacks import Stack, keep
from launch.watch import Limits, Watch, seconds_between_looks
from megatron_joy.errors import HopelessError, UserError, WorkError
from megatron_joy.runstate import launch_folder
from megatron_joy.runstate.lease import Lease
from megatron_joy.runstate.state import read_state

POLL_SECONDS = 0.05


class Ranks(Protocol):
    """The ranks of one attempt, started."""

    def running(self) -> bool:
        """Whether any is left; looks after them, so it is called often."""

    def ask_to_stop(self) -> None:
        """Asks all to checkpoint and leave."""

    def kill(self) -> None:
        """Ends all, at once."""

    def stacks(self) -> list[Stack]:
        """Where each is."""

    def ended(self) -> Ended:
        """How it came to an end, once none is running."""


class Place(Protocol):
    """Where attempts are made."""

    launch: str  # what all attempts of this launch have in common, also after a requeue

    def start(self, fence: int) -> Ranks:
        """Starts an attempt's ranks."""

    def leave_out(self, nodes: Sequence[str]) -> None:
        """No more attempts on these nodes."""

    def move_on(self, failed: bool) -> bool:
        """Whether the run goes on elsewhere, now arranged for: the job is requeued. After a stop, or when a `failed`
        attempt can't be followed by one in this place.
        """


@dataclass
class Signals:
    """What was asked of the supervisor."""

    stop: bool = False
    again: bool = False

    @contextmanager
    def listening(self) -> Iterator["Signals"]:
        """SIGTERM, Ctrl-C and SIGUSR1 (Slurm's warning before the time is up) ask for a stop; a second one kills."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.again = self.stop and number != signal.SIGUSR1
            self.stop = True

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        before = {number: signal.signal(number, ask) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def say(text: str) -> None:
    """A line for whoever reads the job's output."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} supervisor: {text}", file=sys.stderr, flush=True)


@dataclass
class Supervisor:
    """One launch of a run, in one allocation."""

    run: Path
    place: Place
    restarts: int
    limits: Limits = field(default_factory=Limits)
    first_wait: float = FIRST_WAIT_SECONDS

    def supervise(self) -> Decision:
        """Makes attempts until the policy says that it is enough; what was decided last."""
        lease = Lease(self.run, self.place.launch)
        with Signals().listening() as signals:
            try:
                while True:
                    attempt = self._attempt(lease, signals)
                    self._record(attempt)
                    decision = decide(self._history(), self.restarts, self.first_wait)
                    say(f"{decision.why}: {decision.action}")
                    if not self._goes_on_here(attempt, decision, signals):
                        return self._leave(decision, signals)
            finally:
                lease.release()

    def _attempt(self, lease: Lease, signals: Signals) -> Attempt:
        fence = lease.take()
        watch = Watch(self.run, fence, self.limits)
        ranks = self.place.start(fence)
        try:
            asked, hang = self._look_after(ranks, watch, lease, signals)
        except BaseException:
            ranks.kill()
            raise
        watch.look()
        ended, state = ranks.ended(), read_state(self.run, fence)
        outcome = judge(state, ended, asked, bool(hang))
        done = max(watch.done, state.done if state else 0)
        return Attempt(fence, outcome, done, self._message(outcome, hang, ended), ended.nodes)

    def _look_after(self, ranks: Ranks, watch: Watch, lease: Lease, signals: Signals) -> tuple[bool, str]:
        """Until no rank is left: (whether they were asked to stop, the line about a hang)."""
        hang, asked, looked = "", False, 0.0
        while ranks.running():
            lease.renew()
            if signals.stop and not asked:
                asked = True
                say("stopping: the ranks finish their step and checkpoint; a second signal kills them")
                ranks.ask_to_stop()
            if signals.again:
                ranks.kill()
            now = time.monotonic()
            if not hang and now - looked > seconds_between_looks(self.limits):
                looked = now
                if hang := watch.look() or "":
                    hang = keep(self.run, watch.fence, hang, ranks.stacks())
                    ranks.kill()
            time.sleep(POLL_SECONDS)
        return asked, hang

    def _message(self, outcome: Outcome, hang: str, ended: Ended) -> str:
        if outcome in (Outcome.FINISHED, Outcome.STOPPED):
            return ""
        if ended.nodes:  # the cause of a hang, too
            return ended.message
        return hang or ended.message or f"the ranks left with exit code {ended.exit_code}"

    def _goes_on_here(self, attempt: Attempt, decision: Decision, signals: Signals) -> bool:
        if decision.action is not Action.RESTART:
            return False
        self.place.leave_out(attempt.nodes)
        end = time.monotonic() + decision.wait_seconds
        while time.monotonic() < end and not signals.stop:
            time.sleep(POLL_SECONDS)
        return not signals.stop and not self.place.move_on(failed=True)

    def _leave(self, decision: Decision, signals: Signals) -> Decision:
        if decision.action is Action.RESTART and not signals.stop:
            return Decision(Action.LEAVE, decision.why)  # it goes on elsewhere: arranged for
        if signals.again and decision.action is not Action.FINISH:
            text = "killed before the ranks could checkpoint; the same command goes on from the last checkpoint"
            return Decision(Action.GIVE_UP, text, exit_code=EXIT_FAILED)
        if decision.action in (Action.LEAVE, Action.RESTART):
            code = EXIT_FINISHED if self.place.move_on(failed=False) else EXIT_STOPPED
            return Decision(Action.LEAVE, decision.why, exit_code=code)
        return decision

    def _record(self, attempt: Attempt) -> None:
        row = asdict(attempt) | {"launch": self.place.launch, "time": time.time()}
        with open(launch_folder(self.run) / "attempts.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def _history(self) -> list[Attempt]:
        return read_history(self.run, self.place.launch)


def read_history(run: Path, launch: str) -> list[Attempt]:
    """The attempts of a launch, in order, also those before a requeue. A torn line is passed over."""
    history = []
    for line in (launch_folder(run) / "attempts.jsonl").read_bytes().splitlines():
        try:
            row = json.loads(line)
            if row.pop("launch") == launch:
                del row["time"]
                history.append(Attempt(**row | {"outcome": Outcome(row["outcome"]), "nodes": tuple(row["nodes"])}))
        except (ValueError, KeyError, TypeError):
            continue
    return history


def conclude(decision: Decision) -> int:
    """A launch's exit code: 0, or 75 after a stop. Raises UserError, HopelessError or WorkError for the others."""
    kinds = {EXIT_USER_MISTAKE: UserError, EXIT_HOPELESS: HopelessError, EXIT_FAILED: WorkError}
    if decision.exit_code in kinds:
        raise kinds[decision.exit_code](decision.why)
    return decision.exit_code
