"""Reading a run's folder: which rows count, what damage costs, and how attempts ended."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_joy.errors import UserError
from megatron_joy.report.jsonl import tail_rows
from megatron_joy.report.metrics import COLUMNS, read_metrics, winners
from megatron_joy.report.runlog import RunLog, read_run
from megatron_joy.report.summary import summarize
from tests.report.synthetic import START_TIME, Plan, Truth, write_run

LATER = START_TIME + 1e6


def read(folder: Path, plan: Plan, now: float = LATER) -> tuple[RunLog, Truth]:
    truth = write_run(folder, plan)
    return read_run(folder, now=now), truth


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_column_holds_the_rows_that_count(tmp_path: Path) -> None:
    run, truth = read(tmp_path, Plan(steps=120, kills=((70, 50), (90, 80))))
    assert run.metrics.step.tolist() == sorted(truth.rows) == list(range(1, 121))
    for name in COLUMNS:
        expected = [truth.rows[step].get(name, np.nan) for step in sorted(truth.rows)]
        np.testing.assert_array_equal(run.metrics[name], np.array(expected, float))
    assert run.metrics.superseded == truth.superseded == 20 + 10


def test_resumed_rows_win_over_those_they_repeat(tmp_path: Path) -> None:
    run, _ = read(tmp_path, Plan(steps=60, kills=((40, 30),)))
    assert run.metrics.attempt.tolist() == [0] * 30 + [1] * 30


def test_steps_an_attempt_lost_are_no_history_before_they_are_reached_again(tmp_path: Path) -> None:
    rows = [{"step": s, "attempt": 0, "time": START_TIME + s, "loss": 5.0} for s in range(1, 101)]
    rows += [{"step": s, "attempt": 1, "time": START_TIME + 200 + s, "loss": 4.0} for s in range(81, 86)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    run = read_run(tmp_path, now=LATER)
    assert run.metrics.step[-1] == 85
    assert summarize(run).steps_done == 85
    assert summarize(run).lost_steps == 20


def test_an_attempt_that_left_no_row_still_undoes_what_it_resumed_before(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, "attempt": 0, "loss": 1.0} for s in range(1, 11)])
    assert len(read_metrics(tmp_path / "metrics.jsonl", cuts={0: 0, 1: 6})) == 6


def test_which_lines_count_agrees_with_replaying_them() -> None:
    """The reference plays the lines one by one as the run wrote them; attempts begin, and guards go, some way back."""
    random = np.random.default_rng(1)
    for _ in range(200):
        lines: list[tuple[int, int]] = []
        start = 0
        for attempt in range(random.integers(1, 6)):
            length = int(random.integers(0, 12))
            lines += [(start + 1 + i, attempt) for i in range(length)]
            while length and random.random() < 0.3:
                start, length = int(random.integers(0, start + length)), int(random.integers(1, 12))
                lines += [(start + 1 + i, attempt) for i in range(length)]
            start = int(random.integers(0, start + length + 1))
        history: dict[int, int] = {}
        for place, (step, attempt) in enumerate(lines):
            if place and (attempt != lines[place - 1][1] or step <= lines[place - 1][0]):
                history = {s: p for s, p in history.items() if s < step}
            history[step] = place
        step, attempt_of = (np.array([line[i] for line in lines], np.int64) for i in (0, 1))
        assert np.flatnonzero(winners(step, attempt_of, {})).tolist() == sorted(history.values())


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    run, truth = read(tmp_path, Plan(steps=30, torn_tail=b'{"step": 31, "attempt": 0, "lo', last_word="none"))
    assert run.metrics.step.tolist() == sorted(truth.rows)
    assert run.metrics.torn_tail == 30
    assert any("torn line (30 bytes)" in notice for notice in run.notices)


def test_torn_lines_inside_the_file_are_counted_and_cost_nothing_else(tmp_path: Path) -> None:
    run, truth = read(tmp_path, Plan(steps=90, kills=((40, 30), (70, 60)), torn_kills=True))
    assert run.metrics.step.tolist() == sorted(truth.rows)
    assert run.metrics.damaged == 2


def test_a_line_that_ends_well_but_is_no_json_is_left_out(tmp_path: Path) -> None:
    good = json.dumps({"step": 1, "attempt": 0, "loss": 2.0})
    (tmp_path / "metrics.jsonl").write_text(f'{good}\n{{"step": 2, "attempt": 0, "loss": }}\n\x00\x00\x00}}\n')
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics.step.tolist() == [1]
    assert metrics.damaged == 2


def test_a_last_whole_line_without_its_newline_counts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "attempt": 0, "loss": 2.0}))
    assert read_metrics(tmp_path / "metrics.jsonl")["loss"].tolist() == [2.0]


@pytest.mark.parametrize("text", ["null", "NaN", "Infinity"])
def test_a_loss_that_is_no_number_is_named_however_it_is_written(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 7, "attempt": 0, "loss": {text}, "mtp_loss": null}}\n')
    assert read_metrics(tmp_path / "metrics.jsonl").nonfinite == {"loss": [7]}


@pytest.mark.parametrize(
    ("plan", "now", "outcome"),
    [
        (Plan(steps=40), LATER, "finished"),
        (Plan(steps=40, last_word="stop"), LATER, "stopped"),
        (Plan(steps=40, last_word="error"), LATER, "failed"),
        (Plan(steps=40, last_word="none"), LATER, "killed"),
        (Plan(steps=40, last_word="none"), START_TIME + 20, "running"),
    ],
)
def test_how_the_last_attempt_ended(tmp_path: Path, plan: Plan, now: float, outcome: str) -> None:
    run, _ = read(tmp_path, plan, now)
    assert run.attempts[-1].outcome == outcome


def test_attempts_say_where_they_began_and_what_they_lost(tmp_path: Path) -> None:
    run, _ = read(tmp_path, Plan(steps=100, kills=((45, 40), (60, 40)), stops=(80,)))
    seen = [(a.start_step, a.end_step, a.kept_step, a.lost_steps, a.outcome) for a in run.attempts]
    assert seen == [
        (0, 45, 40, 5, "killed"),
        (40, 60, 40, 20, "killed"),
        (40, 80, 80, 0, "stopped"),
        (80, 100, 100, 0, "finished"),
    ]
    assert [(a.world_size, a.layout) for a in run.attempts] == [(4, "PP2 EP2")] * 4


def test_expert_load_is_averaged_over_buckets_and_over_the_last_steps(tmp_path: Path) -> None:
    plan = Plan(steps=1000, layers=2, experts=4)
    run, truth = read(tmp_path, plan)
    load = run.metrics.load
    assert load is not None
    every = np.array([truth.rows[s]["expert_load"] for s in range(1, 1001)]) * plan.experts  # [steps, L, E]
    for bucket, (first, end) in enumerate(zip(load.edges[:-1], load.edges[1:], strict=True)):
        np.testing.assert_allclose(load.ratio[bucket], every[first - 1 : end - 1].mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(load.imbalance[bucket], every[first - 1 : end - 1].max(axis=2).mean(axis=0))
        np.testing.assert_allclose(load.peak[bucket], every[first - 1 : end - 1].max(axis=(0, 2)))
    assert load.tail_first_step == 951
    np.testing.assert_allclose(load.tail_ratio, every[950:].mean(axis=0))


def test_dead_and_overloaded_experts_are_named_by_the_models_layer(tmp_path: Path) -> None:
    run, _ = read(tmp_path, Plan(steps=400, dead=((1, 5),), hot=((2, 3),)))
    summary = summarize(run)
    assert summary.dead_experts == [(2, 5)]  # the model's layer 0 is dense
    assert (3, 3) in summary.overloaded_experts


def test_sources_are_counted_over_the_rows_that_count(tmp_path: Path) -> None:
    run, truth = read(tmp_path, Plan(steps=200, kills=((150, 100),), sources={"a": 0.2, "b": 0.8}))
    sources = run.metrics.sources
    assert sources is not None
    assert sources.names == ["b", "a"]
    expected = [sum(row["sources"][name] for row in truth.rows.values()) for name in ("b", "a")]
    assert sources.total.tolist() == expected
    assert sources.samples.sum() == 16 * 200


def test_checkpoints_on_disk_are_listed_with_their_state(tmp_path: Path) -> None:
    write_run(tmp_path, Plan(steps=200))
    (tmp_path / "checkpoints" / "step_00000150" / "COMMITTED.json").unlink()
    (tmp_path / "checkpoints" / ".step_00000250.writing-0").mkdir()
    found = read_run(tmp_path, now=LATER).checkpoints
    assert [(c.step, c.committed) for c in found] == [(100, True), (150, False), (200, True)]
    assert found[0].size_bytes == 1002


def test_a_folder_that_is_no_run_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "tiny", Plan(steps=3))
    with pytest.raises(UserError, match=r"metrics.jsonl and events.jsonl are missing; did you mean .*tiny"):
        read_run(tmp_path / "runs", now=LATER)
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "nowhere", now=LATER)


def test_a_run_with_only_metrics_is_read_and_what_is_missing_is_said(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "attempt": 0, "time": START_TIME, "loss": 3.0}])
    run = read_run(tmp_path, now=LATER)
    assert summarize(run).train_loss == 3.0
    text = " ".join(run.notices)
    assert all(name in text for name in ("recipe.toml", "environment.json", "events.jsonl"))


def test_a_run_that_wrote_nothing_yet_is_read(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").touch()
    summary = summarize(read_run(tmp_path, now=LATER))
    assert (summary.status, summary.steps_done, summary.train_loss) == (None, 0, None)


def test_the_last_rows_come_from_the_end_of_a_file_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": s, "filler": "x" * 3000} for s in range(1, 301)])
    with path.open("ab") as file:
        file.write(b'{"step": 301, "fil')
    assert [row["step"] for row in tail_rows(path, 50)] == list(range(251, 301))
    assert [row["step"] for row in tail_rows(path, 50, max_bytes=10_000)] == [298, 299, 300]
    assert len(tail_rows(path, 1000)) == 300
    assert tail_rows(tmp_path / "none", 5) == []
