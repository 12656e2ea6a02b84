"""Heartbeats say where a rank is and how long its steps take; what makes a hang is arithmetic."""

import time
from pathlib import Path

import pytest

from launch.watch import Limits, Watch
from megatron_joy.runstate.heartbeat import Beat, Heart, Phase, read_beat, read_beats


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test turns: its only element."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_median_is_of_steps_alone_and_forgotten_with_the_stage(tmp_path: Path, clock: list[float]) -> None:
    heart = Heart(tmp_path, 0, fence=2)
    for done, seconds in enumerate((1.0, 5.0, 2.0)):
        heart.beat(done, "step")
        clock[0] += seconds
        heart.beat(done + 1, "between")
        clock[0] += 1000.0  # a checkpoint
    beat = read_beat(tmp_path, 0, 2)
    assert beat is not None
    assert (beat.done, beat.phase, beat.median) == (3, "between", 2.0)
    heart.forget()
    heart.beat(3, "step")
    assert read_beat(tmp_path, 0, 2) == Beat(0, 2, beat.node, beat.pid, 3, "step", None)
    assert read_beat(tmp_path, 0, 1) is None  # of another attempt


def test_a_shorter_line_leaves_nothing_of_a_longer_one_and_garbage_is_no_beat(tmp_path: Path) -> None:
    Heart(tmp_path, 1, fence=1).beat(10**9, "between")
    Heart(tmp_path, 1, fence=1).beat(1, "end")
    Heart(tmp_path, 0, fence=1).beat(1, "end")
    assert [(beat.rank, beat.done) for beat in read_beats(tmp_path, 1)] == [(0, 1), (1, 1)]
    path = next(tmp_path.rglob("rank_1.json"))
    assert path.stat().st_size == 256
    for content in (b"", b"{", b"[]", b'{"rank": 1}'):
        path.write_bytes(content)
        assert [beat.rank for beat in read_beats(tmp_path, 1)] == [0]


@pytest.mark.parametrize(
    ("phase", "median", "limit"),
    [("step", 2.0, 20.0), ("step", 0.1, 5.0), ("step", None, 300.0), ("between", 2.0, 300.0), ("start", None, 300.0)],
)
def test_the_limit_is_that_of_the_phase(phase: Phase, median: float | None, limit: float) -> None:
    limits = Limits(factor=10, least=5, slow=300)
    assert limits.of(Beat(0, 1, "n1", 1, 3, phase, median)) == limit
    assert limits.of(None) == 300


def test_a_hang_is_told_with_place_and_limit_and_only_then(tmp_path: Path, clock: list[float]) -> None:
    heart, watch = Heart(tmp_path, 0, 1), Watch(tmp_path, 1, Limits(factor=10, least=5, slow=300))
    clock[0] += 299
    assert watch.look() is None
    heart.beat(0, "start")
    for done in range(3):
        heart.beat(done, "step")
        assert watch.look() is None
        clock[0] += 2.0
        heart.beat(done + 1, "between")
    assert watch.look() is None
    clock[0] += 250  # a checkpoint
    assert watch.look() is None
    heart.beat(3, "step")
    assert watch.look() is None
    clock[0] += 19
    assert watch.look() is None
    clock[0] += 2
    assert watch.look() == "hangs in step 4: no sign for 21 s (limit 20 s, a step takes 2.00 s in the median)"
    assert watch.done == 3


def test_what_happened_while_nobody_looked_is_no_hang(tmp_path: Path, clock: list[float]) -> None:
    heart, watch = Heart(tmp_path, 0, 1), Watch(tmp_path, 1, Limits(factor=10, least=5, slow=20))
    heart.beat(0, "step")
    assert watch.look() is None
    clock[0] += 1000  # launcher and ranks were stopped (Ctrl-Z) and go on
    assert watch.look() is None
    clock[0] += 19
    assert watch.look() is None
    clock[0] += 2
    assert watch.look() is not None


def test_a_heartbeat_that_was_left_behind_is_none_of_the_attempts(tmp_path: Path, clock: list[float]) -> None:
    heart = Heart(tmp_path, 0, 0)
    heart.beat(7, "step")
    watch = Watch(tmp_path, 0, Limits(factor=10, least=5, slow=25), read_beats(tmp_path, 0))
    watch._changed = watch._looked = clock[0]
    clock[0] += 24
    assert watch.look() is None
    clock[0] += 2
    assert watch.look() == "hangs before the loop: no sign for 26 s (limit 25 s)"
    assert watch.done == 0
    Heart(tmp_path, 0, 0).beat(3, "step")
    assert watch.look() is None
    assert watch.done == 3
