"""SIGTERM and Ctrl-C: the step is finished, a checkpoint written, the exit code is 75, the same command goes on."""

import os
import signal
from pathlib import Path

import pytest

from tests.train.conftest import Unbroken
from tests.train.minuscule import EP2, ONE, STEPS, last_rows, numbers, signal_at, train

TERM, INT = int(signal.SIGTERM), int(signal.SIGINT)


@pytest.mark.parametrize(
    ("layout", "number", "rank"),
    [(ONE, TERM, None), (ONE, INT, None), (EP2, TERM, None), (EP2, TERM, 1)],
    ids=["one TERM", "one INT", "ep2 TERM", "ep2 TERM to rank 1 only"],
)
def test_a_signal_checkpoints_and_the_same_command_goes_on(
    home: Path, tmp_path: Path, unbroken: Unbroken, layout: tuple[str, ...], number: int, rank: int | None
) -> None:
    run = tmp_path / "run"
    stopped = train(home, run, layout, before=signal_at, inputs=(4, number, rank))
    assert set(stopped.codes) == {75}
    assert [row["step"] for row in stopped.rows] == [1, 2, 3, 4]
    assert stopped.checkpoints == ["step_00000003", "step_00000004"]
    assert stopped.events[-1]["kind"] == "stop"
    ended = train(home, run, layout)
    assert set(ended.codes) == {0}
    assert [row["step"] for row in ended.rows] == list(range(1, STEPS + 1))  # no step was trained twice
    assert numbers(ended.rows) == numbers(unbroken(layout).rows)
    assert ended.told("resume")[0].startswith("resumed from step_00000004")


def test_a_signal_during_the_last_step_leaves_a_finished_run(home: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    ended = train(home, tmp_path / "run", ONE, before=signal_at, inputs=(STEPS, TERM))
    assert ended.codes == [0]
    assert ended.events[-1]["kind"] == "finish"
    assert numbers(ended.rows) == numbers(unbroken(ONE).rows)


def _while_data_is_opened(rank: str) -> None:
    from megatron_joy.train import pretrain

    opening = pretrain.open_run

    def then(*arguments: object) -> object:
        if os.environ["RANK"] == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return opening(*arguments)  # type: ignore[arg-type]

    pretrain.open_run = then  # type: ignore[assignment]


def test_a_signal_before_training_stops_all_ranks_before_the_first_step(
    home: Path, tmp_path: Path, unbroken: Unbroken
) -> None:
    stopped = train(home, tmp_path / "run", EP2, before=_while_data_is_opened, inputs=("1",))
    assert set(stopped.codes) == {75}
    assert stopped.rows == []
    assert [event["kind"] for event in stopped.events] == ["start", "stop"]
    ended = train(home, tmp_path / "run", EP2)
    assert set(ended.codes) == {0}
    assert numbers(last_rows(ended.rows)) == numbers(unbroken(EP2).rows)
