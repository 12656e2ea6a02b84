"""Who gets to read what: the terminal its progress and one line of an error, logs/rank_N.log everything else."""

import os
import signal
import warnings
from pathlib import Path

import pytest

from tests.gloo import WorldFailed
from tests.train.minuscule import EP2, ONE, at_step, train


def _warn() -> None:
    """Warns while data is opened, before the run has a log, and again in the third step."""
    from megatron_joy.train import pretrain

    opening = pretrain.open_run

    def then(*arguments: object) -> object:
        warnings.warn("an early warning", stacklevel=1)
        return opening(*arguments)  # type: ignore[arg-type]

    pretrain.open_run = then  # type: ignore[assignment]
    at_step(3, lambda: warnings.warn("a late warning", stacklevel=1))
    at_step(3, lambda: print("a word of rank", os.environ["RANK"], flush=True))


def test_warnings_are_in_the_ranks_logs_and_not_on_the_terminal(home: Path, tmp_path: Path) -> None:
    ended = train(home, tmp_path / "run", EP2, before=_warn)
    assert ended.codes == [0, 0]
    for rank in (0, 1):
        log = (tmp_path / "run" / "logs" / f"rank_{rank}.log").read_text()
        assert log.index("an early warning") < log.index("a late warning")
        assert f"rank {rank} attempt 0 WARNING" in log
        assert "early warning" not in ended.printed[rank]
        assert "late warning" not in ended.printed[rank]
    assert "a word of rank 0" in ended.printed[0]  # it has the terminal
    assert "a word of rank 1" in (tmp_path / "run" / "logs" / "rank_1.log").read_text()
    assert ended.printed[1] == ""


def test_output_without_a_terminal_is_plain_lines(home: Path, tmp_path: Path) -> None:
    ended = train(home, tmp_path / "run", ONE, "train.log_interval=4")
    run = tmp_path / "run"
    lines = ended.printed[0].splitlines()
    assert lines[0] == f"{run}: training begins on 1 process"
    assert [line.split("  ")[0] for line in lines[1:-1]] == ["step 4/8", "step 8/8"]
    assert lines[-1] == f"{run}: all 8 steps are done; `joy report {run}` shows them"
    assert "\x1b" not in ended.printed[0]


def _a_bug() -> None:
    def fail() -> None:
        raise LookupError("no such\nthing")

    at_step(2, fail)


def test_a_bug_on_rank_0_is_one_line_on_the_terminal_and_a_traceback_in_the_log(home: Path, tmp_path: Path) -> None:
    failed = train(home, tmp_path / "run", ONE, before=_a_bug)
    assert failed.codes == [1]
    log = tmp_path / "run" / "logs" / "rank_0.log"
    assert failed.printed[0].splitlines()[-1] == (
        f"error: rank 0: LookupError: no such thing; the traceback is in {log}"
    )
    assert "Traceback" not in failed.printed[0]
    assert "Traceback (most recent call last)" in log.read_text()
    assert 'raise LookupError("no such\\nthing")' in log.read_text()
    assert failed.told("error") == ["LookupError: no such thing"]


def _crash() -> None:
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGSEGV))


def test_a_crash_of_the_interpreter_leaves_its_stack_in_the_log(home: Path, tmp_path: Path) -> None:
    with pytest.raises(WorldFailed) as crashed:
        train(home, tmp_path / "run", ONE, before=_crash)
    assert crashed.value.exit_code == -signal.SIGSEGV
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert "Fatal Python error: Segmentation fault" in log
    assert "loop.py" in log
