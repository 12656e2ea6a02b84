"""A disk that refuses a checkpoint: in mid-run training goes on from memory and says so; at the end it fails cleanly.

The kernel itself refuses, by a limit on the size of the files that one rank may write (RLIMIT_FSIZE).
"""

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from megatron_joy.checkpoint.find import latest
from tests.train.conftest import Unbroken
from tests.train.minuscule import EP2, STEPS, numbers, signal_at, train
from tests.train.test_stop import TERM

ROOM = 100_000  # bytes that a rank may write into a file


def _full_at(steps: tuple[int, ...], rank: str, stop: int | None = None) -> None:
    """The disk of one rank is full while the checkpoints of these steps are written."""
    from megatron_joy.train.features import checkpointing

    save = checkpointing.save_checkpoint
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def then(folder: Path, step: int, **more: Any) -> Path:
        if step in steps and os.environ["RANK"] == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
        try:
            return save(folder, step, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    checkpointing.save_checkpoint = then
    if stop is not None:
        signal_at(stop, TERM)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_full_disk_in_mid_run_is_noted_and_training_goes_on(
    home: Path, tmp_path: Path, unbroken: Unbroken, rank: str
) -> None:
    ended = train(home, tmp_path / "run", EP2, before=_full_at, inputs=((6,), rank))
    assert ended.codes == [0, 0]
    (note,) = ended.told("alarm")
    assert f"checkpoint of step 6 was not written to {tmp_path / 'run' / 'checkpoints'}: rank {rank}: File too" in note
    assert note.endswith("the last whole one is step_00000003; training goes on from memory")
    assert note in ended.printed[0]
    assert ended.checkpoints == ["step_00000003", "step_00000008"]
    assert numbers(ended.rows) == numbers(unbroken(EP2).rows)


def test_a_full_disk_at_the_end_fails_and_says_which_checkpoint_holds(
    home: Path, tmp_path: Path, unbroken: Unbroken
) -> None:
    run = tmp_path / "run"
    failed = train(home, run, EP2, before=_full_at, inputs=((STEPS,), "1"))
    assert failed.codes == [1, 1]
    (said,) = [line for line in failed.printed[0].splitlines() if line.startswith("error: ")]
    assert "rank 1: File too large" in said
    assert said.endswith("the last whole one is step_00000006")
    assert "Traceback" not in failed.printed[0]
    assert failed.events[-1]["kind"] == "error"
    assert latest(run / "checkpoints", full=True).checkpoint.step == 6  # type: ignore[union-attr]
    assert failed.checkpoints == ["step_00000003", "step_00000006"]
    ended = train(home, run, EP2)  # there is room again
    assert ended.codes == [0, 0]
    assert numbers(ended.rows[-2:]) == numbers(unbroken(EP2).rows[-2:])


def test_a_full_disk_when_a_stop_was_asked_for_fails_too(home: Path, tmp_path: Path) -> None:
    failed = train(home, tmp_path / "run", EP2, before=_full_at, inputs=((4,), "0", 4))
    assert failed.codes == [1, 1]
    assert failed.checkpoints == ["step_00000003"]


def _no_room_for_metrics() -> None:
    from megatron_joy.report import jsonl

    write = os.pwrite
    jsonl.PATIENCE_SECONDS = 0.2

    def then(descriptor: int, line: bytes, at: int) -> int:
        if b'"step":5' not in line:
            return write(descriptor, line, at)
        write(descriptor, line[:50], at)
        raise OSError(errno.ENOSPC, "No space left on device")

    jsonl.os.pwrite = then  # type: ignore[assignment]


def test_metrics_that_cannot_be_written_stop_the_run_with_one_line(home: Path, tmp_path: Path) -> None:
    failed = train(home, tmp_path / "run", before=_no_room_for_metrics)
    assert failed.codes == [1]
    (said,) = [line for line in failed.printed[0].splitlines() if line.startswith("error: ")]
    assert said == f"error: {tmp_path / 'run' / 'metrics.jsonl'}: cannot append a row: No space left on device"
    assert [row["step"] for row in failed.rows] == [1, 2, 3, 4]  # whole lines
