"""What follows which end of an attempt: the table of docs/launch.md, row by row."""

import pytest

from launch.policy import Action, Attempt, Ended, Outcome, decide, fruitless, judge
from megatron_joy.runstate.state import State

FINISHED, STOPPED, RUNNING = (State(1, word, 5) for word in ("finished", "stopped", "running"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "ended", "asked", "hung", "outcome"),
    [
        (FINISHED, Ended(0), False, False, Outcome.FINISHED),
        (FINISHED, Ended(143), True, False, Outcome.FINISHED),  # the state is right, exit codes lie
        (STOPPED, Ended(143), True, False, Outcome.STOPPED),
        (STOPPED, Ended(1, 1, "killed while leaving"), True, False, Outcome.STOPPED),
        (RUNNING, Ended(0), False, False, Outcome.FAILED),  # srun gives 0 for a dead node
        (RUNNING, Ended(137), False, True, Outcome.HUNG),
        (STOPPED, Ended(75), False, True, Outcome.HUNG),  # what hung could save when it was woken
        (FINISHED, Ended(0), False, True, Outcome.FINISHED),
        (RUNNING, Ended(1, 1, "a bug"), False, False, Outcome.FAILED),
        (RUNNING, Ended(1, 1, "a bug"), True, False, Outcome.FAILED),
        (None, Ended(2, 2, "no such shard"), False, False, Outcome.MISTAKE),
        (None, Ended(143, 2, "no such shard"), False, False, Outcome.MISTAKE),
        (RUNNING, Ended(93), False, False, Outcome.HOPELESS),
        (None, Ended(143), True, False, Outcome.STOPPED),  # before the ranks could listen
        (None, Ended(143), False, False, Outcome.FAILED),
    ],
)
def test_the_state_is_believed_first_and_exit_codes_last(
    state: State | None, ended: Ended, asked: bool, hung: bool, outcome: Outcome
) -> None:
    assert judge(state, ended, asked, hung) is outcome


def history(*rows: tuple[Outcome, int]) -> list[Attempt]:
    """Attempts with how they ended and how many updates were then done."""
    return [Attempt(number, outcome, done) for number, (outcome, done) in enumerate(rows, start=1)]


FAILED, HUNG, STOP = Outcome.FAILED, Outcome.HUNG, Outcome.STOPPED


@pytest.mark.parametrize(
    ("rows", "restarts", "action", "exit_code", "wait"),
    [
        ([(Outcome.FINISHED, 9)], 0, Action.FINISH, 0, 0.0),
        ([(STOP, 3)], 0, Action.LEAVE, 75, 0.0),
        ([(Outcome.MISTAKE, 0)], 9, Action.GIVE_UP, 2, 0.0),
        ([(Outcome.HOPELESS, 4)], 9, Action.GIVE_UP, 93, 0.0),
        ([(FAILED, 4)], 0, Action.GIVE_UP, 1, 0.0),
        ([(FAILED, 4)], 3, Action.RESTART, 0, 5.0),
        ([(FAILED, 4), (FAILED, 8)], 3, Action.RESTART, 0, 10.0),
        ([(FAILED, 4), (HUNG, 8), (FAILED, 9)], 3, Action.RESTART, 0, 20.0),
        ([(FAILED, 4), (HUNG, 8), (FAILED, 9), (FAILED, 12)], 3, Action.GIVE_UP, 93, 0.0),
        ([(FAILED, 4), (STOP, 8), (STOP, 9), (FAILED, 12)], 2, Action.RESTART, 0, 10.0),  # stops don't count
        ([(FAILED, 4), (FAILED, 4)], 9, Action.RESTART, 0, 10.0),
        ([(FAILED, 4), (FAILED, 4), (FAILED, 3)], 9, Action.GIVE_UP, 93, 0.0),  # twice without a new step
        ([(FAILED, 0), (HUNG, 0)], 9, Action.GIVE_UP, 93, 0.0),
        ([(FAILED, 4), (FAILED, 4), (FAILED, 5)], 9, Action.RESTART, 0, 20.0),
    ],
)
def test_what_follows(
    rows: list[tuple[Outcome, int]], restarts: int, action: Action, exit_code: int, wait: float
) -> None:
    decision = decide(history(*rows), restarts)
    assert (decision.action, decision.exit_code, decision.wait_seconds) == (action, exit_code, wait)


def test_waiting_grows_to_a_limit() -> None:
    many = history(*((FAILED, step) for step in range(1, 30)))
    assert decide(many, 99).wait_seconds == 300.0
    assert fruitless(many) == 0
