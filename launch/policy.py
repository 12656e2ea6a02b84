"""How an attempt ended, and what follows: two pure functions over what was seen. docs/launch.md has the table."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_joy.runstate.state import State

EXIT_FINISHED, EXIT_FAILED, EXIT_USER_MISTAKE, EXIT_STOPPED, EXIT_HOPELESS = 0, 1, 2, 75, 93
FRUITLESS = 2  # so many failed attempts in a row without a step that is new, and a further one is pointless
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 5.0, 300.0


class Outcome(StrEnum):
    """How an attempt ended."""

    FINISHED = "finished"
    STOPPED = "stopped"  # as asked, with a checkpoint
    MISTAKE = "mistake"  # the user's: recipe, data, layout
    HOPELESS = "hopeless"  # it would fail the same way again
    HUNG = "hung"
    FAILED = "failed"


class Action(StrEnum):
    """What a supervisor does next."""

    FINISH = "finish"
    LEAVE = "leave"  # after a stop: requeue the job where there is one
    RESTART = "restart"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Ended:
    """What is known of an attempt's processes when all are gone.

    exit_code: the launcher's, which may say little; said: that of the first rank that told why it left; message: its
    reason in a line; nodes: those that are to blame.
    """

    exit_code: int
    said: int | None = None
    message: str = ""
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attempt:
    """One row of a launch's history. done: updates that were done when it ended, of the whole run."""

    fence: int
    outcome: Outcome
    done: int
    message: str = ""
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """What to do and why; the wait comes before a restart."""

    action: Action
    why: str
    wait_seconds: float = 0.0
    exit_code: int = EXIT_FINISHED


def judge(state: State | None, ended: Ended, asked_to_stop: bool, hung: bool) -> Outcome:
    """How an attempt ended: the run's state first, then the ranks' own reason, exit codes last."""
    if state is not None and state.word == "finished":
        return Outcome.FINISHED
    if hung:  # also when the ranks could save, as Slurm lets them before it kills them
        return Outcome.HUNG
    if state is not None and state.word == "stopped":
        return Outcome.STOPPED
    code = ended.exit_code if ended.said is None else ended.said
    if code == EXIT_USER_MISTAKE:
        return Outcome.MISTAKE
    if code == EXIT_HOPELESS:
        return Outcome.HOPELESS
    if asked_to_stop and ended.said is None:  # before the first step; the launcher's exit code is that of the signal
        return Outcome.STOPPED
    return Outcome.FAILED


def fruitless(history: Sequence[Attempt]) -> int:
    """How many attempts at the end of a launch's history failed without a step that none before them had done."""
    count, best = 0, -1
    for attempt in history:
        new = attempt.done > max(best, 0)
        best = max(best, attempt.done)
        failed = attempt.outcome in (Outcome.FAILED, Outcome.HUNG)
        count = count + 1 if failed and not new else 0
    return count


def decide(history: Sequence[Attempt], restarts: int, first_wait: float = FIRST_WAIT_SECONDS) -> Decision:
    """What follows the last attempt of a launch, which may fail `restarts` times in all. Planned stops don't count.

    first_wait: seconds before the first restart, doubled before each further one.
    """
    last = history[-1]
    why = f"attempt {last.fence}: {last.message or last.outcome}"
    if last.outcome is Outcome.FINISHED:
        return Decision(Action.FINISH, why)
    if last.outcome is Outcome.STOPPED:
        return Decision(Action.LEAVE, why, exit_code=EXIT_STOPPED)
    if last.outcome is Outcome.MISTAKE:
        return Decision(Action.GIVE_UP, last.message, exit_code=EXIT_USER_MISTAKE)
    if last.outcome is Outcome.HOPELESS:
        return Decision(Action.GIVE_UP, f"{why}; a restart would end the same way", exit_code=EXIT_HOPELESS)
    failures = sum(attempt.outcome in (Outcome.FAILED, Outcome.HUNG) for attempt in history)
    if fruitless(history) >= FRUITLESS:
        text = f"{why}; {FRUITLESS} attempts in a row failed without a new step (the last done is {last.done})"
        return Decision(Action.GIVE_UP, text, exit_code=EXIT_HOPELESS)
    if failures > restarts:
        text = f"{why}; no restart is left of {restarts}"
        return Decision(Action.GIVE_UP, text, exit_code=EXIT_HOPELESS if restarts else EXIT_FAILED)
    wait = min(first_wait * 2 ** (failures - 1), LONGEST_WAIT_SECONDS)
    return Decision(Action.RESTART, f"{why}; restart {failures} of {restarts}", wait)
