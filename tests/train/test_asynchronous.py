"""Checkpoints beside training: the numbers, the record and the end are as without; one at a time is on its way."""

import errno
import os
import resource
import time
from pathlib import Path
from typing import Any

from megatron_joy.checkpoint.find import latest, open_checkpoint
from tests.train.conftest import Unbroken
from tests.train.minuscule import EP2, ONE, STEPS, numbers, signal_at, train, validation
from tests.train.test_guards import ROLLBACK, poison
from tests.train.test_stop import TERM

ASYNCHRONOUS = "checkpoint.asynchronous=true"


def _slowly(seconds: float, stop: int | None = None) -> None:
    """Each rank's tensors take longer than several steps; a signal comes in the midst of one."""
    from megatron_joy.checkpoint import background

    write = background.write_image

    def then(*arguments: Any) -> Any:
        time.sleep(seconds)
        return write(*arguments)

    background.write_image = then
    if stop is not None:
        signal_at(stop, TERM, 1)


def test_a_stop_waits_for_the_checkpoint_on_its_way_and_writes_its_own(
    home: Path, tmp_path: Path, unbroken: Unbroken
) -> None:
    run = tmp_path / "run"
    stopped = train(home, run, EP2, ASYNCHRONOUS, before=_slowly, inputs=(2.0, 4))
    assert stopped.codes == [75, 75]
    assert stopped.checkpoints == ["step_00000003", "step_00000004"]
    written = [event for event in stopped.events if event["kind"] == "checkpoint"]
    assert [event["step"] for event in written] == [3, 4]
    assert "beside training, which waited" in written[0]["message"]
    assert "beside" not in written[1]["message"]
    ended = train(home, run, EP2, ASYNCHRONOUS)
    assert ended.codes == [0, 0]
    assert numbers(ended.rows) == numbers(unbroken(EP2).rows)
    assert ended.checkpoints == ["step_00000004", "step_00000006", "step_00000008"]


def test_a_checkpoint_that_is_due_waits_for_the_one_before(home: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    keep = (ASYNCHRONOUS, "checkpoint.interval=1", "checkpoint.keep_last=20")
    ended = train(home, tmp_path / "run", ONE, *keep, before=_slowly, inputs=(0.3,))
    assert ended.codes == [0]
    assert [event["step"] for event in ended.events if event["kind"] == "checkpoint"] == list(range(1, STEPS + 1))
    assert numbers(ended.rows) == numbers(unbroken(ONE).rows)
    folder = ended.run / "checkpoints"
    for step in range(1, STEPS + 1):
        marker = open_checkpoint(folder / f"step_{step:08d}", full=True).marker
        assert (marker.optimizer_step, marker.state["progress"]["step"]) == (step, step)


def _full_at(step: int, rank: str) -> None:
    """The disk of one rank is full while the tensors of a step are written; other files are small enough."""
    from megatron_joy.checkpoint import background

    write = background.write_image

    def then(folder: Path, *arguments: Any) -> Any:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if f"{step:08d}" in folder.name and os.environ["RANK"] == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            return write(folder, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    background.write_image = then


def test_a_disk_that_fills_beside_training_is_noted_and_the_last_good_state_survives(
    home: Path, tmp_path: Path, unbroken: Unbroken
) -> None:
    ended = train(home, tmp_path / "run", EP2, ASYNCHRONOUS, before=_full_at, inputs=(6, "1"))
    assert ended.codes == [0, 0]
    (note,) = ended.told("alarm")
    assert f"checkpoint of step 6 was not written to {ended.run / 'checkpoints'}: rank 1: File too large" in note
    assert note.endswith("the last whole one is step_00000003; training goes on from memory")
    assert ended.checkpoints == ["step_00000003", "step_00000008"]
    assert numbers(ended.rows) == numbers(unbroken(EP2).rows)
    assert latest(ended.run / "checkpoints", full=True).checkpoint.step == STEPS  # type: ignore[union-attr]


def _one_full_disk(step: int) -> None:
    """While a step's tensors have come to 100 kB there is no room for anything else either, until they are gone."""
    from megatron_joy.checkpoint import storage
    from megatron_joy.report import jsonl

    write, append, lying = storage._HashedStream._write_chunk, os.pwrite, list[Path]()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    storage._CHUNK = 4096

    def write_tensors(stream: Any, chunk: memoryview) -> None:
        path = Path(stream.raw.name)
        if f"{step:08d}" in path.parent.name and stream.size > 100_000:
            lying.append(path)
            raise full
        write(stream, chunk)

    def append_row(descriptor: int, line: bytes, at: int) -> int:
        if any(path.exists() for path in lying):
            raise full
        return append(descriptor, line, at)

    storage._HashedStream._write_chunk = write_tensors  # type: ignore[method-assign]
    jsonl.os.pwrite = append_row  # type: ignore[assignment]


def test_metrics_have_room_again_as_soon_as_a_checkpoint_has_found_the_disk_full(
    home: Path, tmp_path: Path, unbroken: Unbroken
) -> None:
    ended = train(home, tmp_path / "run", ONE, ASYNCHRONOUS, before=_one_full_disk, inputs=(3,))
    assert ended.codes == [0], ended.printed
    (note,) = ended.told("alarm")
    assert "checkpoint of step 3 was not written to" in note and "rank 0: No space left on device; there is" in note
    assert ended.checkpoints == ["step_00000006", "step_00000008"]
    assert numbers(ended.rows) == numbers(unbroken(ONE).rows)


def _poisoned_and_slow() -> None:
    _slowly(2.0)
    poison(70, 50.0)


def test_going_back_waits_for_the_checkpoint_on_its_way_and_goes_to_it(home: Path, tmp_path: Path) -> None:
    plain = train(home, tmp_path / "plain", EP2, *ROLLBACK, before=poison, inputs=(70, 50.0))
    ended = train(home, tmp_path / "run", EP2, *ROLLBACK, ASYNCHRONOUS, before=_poisoned_and_slow)
    assert (plain.codes, ended.codes) == ([0, 0], [0, 0])
    kinds = [event["kind"] for event in ended.events if event["kind"] in ("checkpoint", "rollback")]
    assert kinds[:3] == ["checkpoint", "checkpoint", "rollback"]
    (event,) = [event for event in ended.events if event["kind"] == "rollback"]
    assert event["back_to"] == 6  # written two steps before the spike was seen
    assert numbers(ended.rows) == numbers(plain.rows)
    assert ended.checkpoints == plain.checkpoints


def test_the_best_by_validation_loss_and_every_nth_are_kept(home: Path, tmp_path: Path) -> None:
    policy = ("checkpoint.interval=1", "checkpoint.keep_last=1", "checkpoint.keep_every=3", "checkpoint.keep_best=2")
    ended = train(home, tmp_path / "run", ONE, *validation(home, interval=1), *policy, ASYNCHRONOUS)
    assert ended.codes == [0]
    losses = sorted((row["validation_loss"], -row["step"]) for row in ended.rows)
    kept = {STEPS, 3, 6, *(-step for _, step in losses[:2])}
    assert ended.checkpoints == [f"step_{step:08d}" for step in sorted(kept)]
