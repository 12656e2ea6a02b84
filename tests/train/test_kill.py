"""SIGKILL at any point, then the same command: losses and gradient norms have the bits of an unbroken run."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import Unbroken
from tests.train.minuscule import (
    EP2,
    EP2_MUON,
    ONE,
    Outcome,
    die,
    kill_near,
    last_rows,
    numbers,
    train,
    train_until_killed,
)


def assert_bit_identical(ended: Outcome, reference: Outcome) -> None:
    """Whatever attempt wrote it, each row has the reference's numbers; the last attempts' rows are the whole run."""
    assert set(ended.codes) == {0}
    expected = {row[0]: row for row in numbers(reference.rows)}
    for row in numbers(ended.rows):
        assert row == expected[row[0]]
    assert numbers(last_rows(ended.rows)) == numbers(reference.rows)
    assert [row["expert_load"] for row in last_rows(ended.rows)] == [row["expert_load"] for row in reference.rows]
    assert [row["sources"] for row in last_rows(ended.rows)] == [row["sources"] for row in reference.rows]
    assert ended.checkpoints == reference.checkpoints  # what killed saves left is gone too


@pytest.mark.parametrize("layout", [ONE, EP2, EP2_MUON], ids=["one", "ep2", "ep2-muon"])
def test_kills_at_random_points_change_no_bit(
    home: Path, tmp_path: Path, unbroken: Unbroken, layout: tuple[str, ...]
) -> None:
    generator = random.Random(seed := random.randrange(10**6))
    print(f"seed {seed}")
    for last in (6, 1):
        # Checkpoints come after steps 3 and 6, so they are hit as well.
        train_until_killed(home, tmp_path / "run", layout, kill_near, generator.randint(1, last), generator.random())
    ended = train(home, tmp_path / "run", layout)
    assert_bit_identical(ended, unbroken(layout))
    assert [event["attempt"] for event in ended.events if event["kind"] in ("start", "resume")] == [0, 1, 2]
    # No attempt had time for a stop; a rank that outlives another by a moment may still say that its peer is gone.
    assert not [event for event in ended.events if event["attempt"] < 2 and event["kind"] == "stop"]


def _amid_the_tensors() -> None:
    """Rank 1 dies when it has written a part of its file."""
    from megatron_joy.checkpoint import storage

    write = storage._HashedStream.write

    def then(stream: Any, data: Any) -> int:
        if os.environ["RANK"] == "1" and stream.size > 100_000:
            stream.raw.flush()
            die()
        return write(stream, data)

    storage._HashedStream.write = then  # type: ignore[method-assign]


def _before_the_rename() -> None:
    """Rank 0 dies when all is written and marked, but the checkpoint does not have its name yet."""
    from megatron_joy.checkpoint import save

    save._put_in_place = die  # type: ignore[assignment]


def _while_it_prunes() -> None:
    """Rank 0 dies when it is about to remove an old checkpoint that it has renamed already."""
    from megatron_joy.checkpoint import retention

    retention.shutil.rmtree = die  # type: ignore[assignment]


def test_kills_amid_checkpoints_change_no_bit(home: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    run = tmp_path / "run"
    train_until_killed(home, run, EP2, _amid_the_tensors)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [".step_00000003.writing-0"]
    train_until_killed(home, run, EP2, _before_the_rename)
    ended = train(home, run, EP2)
    assert_bit_identical(ended, unbroken(EP2))
    assert ended.told("start") == ["started on 2 processes (EP2 DP2)"] * 3  # no checkpoint was whole before


def test_a_kill_while_old_checkpoints_are_removed_changes_no_bit(
    home: Path, tmp_path: Path, unbroken: Unbroken
) -> None:
    run, keep = tmp_path / "run", "checkpoint.keep_last=1"
    with pytest.raises(Exception, match="exit code -9"):
        train(home, run, EP2, keep, before=_while_it_prunes)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step_00000006",
        ".step_00000003.removing",
    }
    ended = train(home, run, EP2, keep)
    assert ended.told("resume") == ["resumed from step_00000006 on 2 processes (EP2 DP2)"]
    assert ended.checkpoints == ["step_00000008"]
    assert numbers(last_rows(ended.rows)) == numbers(unbroken(EP2).rows)


def _while_the_recipe_is_written() -> None:
    from megatron_joy.data import atomic

    atomic.commit_partial = die


def _before_the_first_event() -> None:
    from megatron_joy.report.writer import MetricsWriter

    MetricsWriter.event = die  # type: ignore[method-assign]


@pytest.mark.parametrize("before", [_while_the_recipe_is_written, _before_the_first_event])
def test_a_kill_at_the_very_start_leaves_a_folder_to_start_in(
    home: Path, tmp_path: Path, unbroken: Unbroken, before: Callable[[], None]
) -> None:
    train_until_killed(home, tmp_path / "run", ONE, before)
    ended = train(home, tmp_path / "run", ONE)
    assert_bit_identical(ended, unbroken(ONE))


def _amid_a_row() -> None:
    """Dies when a part of the fifth row is on disk."""
    from megatron_joy.report.jsonl import JsonLines

    write = JsonLines._write

    def then(lines: JsonLines, line: bytes) -> None:
        if b'"step":5' in line:
            os.pwrite(lines._descriptor, line[:70], lines._end)
            die()
        write(lines, line)

    JsonLines._write = then  # type: ignore[method-assign]


def test_a_row_torn_by_a_kill_is_removed_and_said(home: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    train_until_killed(home, tmp_path / "run", ONE, _amid_a_row)
    ended = train(home, tmp_path / "run", ONE)
    assert_bit_identical(ended, unbroken(ONE))
    assert ended.told("note") == ["metrics.jsonl ended in a torn line of 70 bytes, which was removed"]
