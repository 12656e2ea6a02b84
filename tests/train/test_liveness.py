"""What a supervisor reads of a run that really trains; and a rank of an attempt that was given up saves nothing."""

import os
from pathlib import Path

from megatron_joy.runstate.heartbeat import read_beats
from megatron_joy.runstate.state import State, read_state
from tests.train.minuscule import EP2, ONE, at_step, train


def _supervised(fence: str) -> None:
    os.environ["JOY_FENCE"] = fence


def _and_given_up(run: str) -> None:
    os.environ["JOY_FENCE"] = "4"
    claims = Path(run) / "launch" / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    at_step(2, (claims / "000005").touch)


def test_a_supervised_run_tells_its_state_and_every_rank_beats(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = train(home, run, EP2, "train.steps=4", "schedule.decay_steps=1", before=_supervised, inputs=("7",))
    assert ended.codes == [0, 0]
    assert read_state(run, 7) == State(7, "finished", 4)
    assert read_state(run, 6) is None
    beats = read_beats(run, 7)
    assert [(beat.rank, beat.done, beat.phase) for beat in beats] == [(0, 4, "end"), (1, 4, "end")]
    assert all(beat.median is not None and beat.median > 0 for beat in beats)


def test_an_attempt_that_was_given_up_saves_nothing(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    failed = train(home, run, ONE, "checkpoint.interval=1", before=_and_given_up, inputs=(str(run),))
    assert failed.codes == [1]
    assert "attempt 4 of" in failed.printed[0]
    assert "was given up and attempt 5 begun; this one writes no more" in failed.printed[0]
    assert failed.checkpoints == ["step_00000001"]
