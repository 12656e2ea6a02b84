"""The planned schedule: the picture's points are the timetable's, its bands the stages; status names the stage."""

import json
import re
from pathlib import Path

import pytest

from megatron_joy.recipe import dump_recipe, load_recipe
from megatron_joy.recipe.timetable import Timetable
from megatron_joy.report.schedule import schedule_panel, stage_at, timetable_of
from megatron_joy.report.status import read_status, render_status


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder whose recipe has four stages, after 20 of 48 steps."""
    (tmp_path / "recipe.toml").write_text(dump_recipe(load_recipe("joyai_tiny_stages")))
    row = {"step": 20, "attempt": 0, "time": 1000.0, "loss": 5.0, "lr": 3e-3, "tokens": 40000, "step_seconds": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    event = {"time": 900.0, "kind": "start", "step": 0, "attempt": 0, "message": "started", "world_size": 1}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    return tmp_path


def points(svg: str, colour: str) -> list[tuple[float, float]]:
    (path,) = re.findall(rf'class="line {colour}" d="M([^"]*)"', svg)
    return [(float(x), float(y)) for x, y in (point.split() for point in path.split("L"))]


@pytest.mark.parametrize(("colour", "key", "highest"), [("c1", "learning_rate", 3e-3), ("c2", "tokens", 4096.0)])
def test_the_lines_are_the_timetables(run: Path, colour: str, key: str, highest: float) -> None:
    timetable = Timetable(load_recipe("joyai_tiny_stages"))
    drawn = points(schedule_panel(run, 20), colour)
    assert len(drawn) == 48
    bottom, top = 26 + 130, 26
    if colour == "c2":
        bottom, top = bottom + 152, top + 152
    for number, (x, y) in enumerate(drawn, start=1):
        assert x == pytest.approx(64 + number / 48 * (1120 - 80), abs=0.06)
        value = (bottom - y) / (bottom - top) * highest * 1.05
        assert value == pytest.approx(float(getattr(timetable.at(number), key)), abs=highest * 1e-3)


def test_each_stage_is_a_band(run: Path) -> None:
    titles = re.findall(r"<title>([^<]*)</title>", schedule_panel(run, 20))
    assert [title.partition(":")[0] for title in titles] == ["warmup", "stable", "decay", "long"]
    assert titles[2] == "decay: updates 25 to 36, 24.6k tokens"


def test_the_stages_stand_below_in_figures_also_where_bands_are_too_narrow_for_names(run: Path) -> None:
    (run / "recipe.toml").write_text(dump_recipe(load_recipe("joyai_48b_a3b")))
    rows = re.findall(r"<tr>(<td.*?)</tr>", schedule_panel(run, 20))
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in rows]
    assert [row[0] for row in cells] == ["warmup", "stable", "code_math", "mid_training", "long_64k", "long_128k"]
    assert cells[0][1:8] == ["1–3,934", "100B", "13.1M → 37.7M", "4,096", "0 → 0.00042", "off", "3.2e+07"]
    assert cells[0][8] == "web 70%, code 15%, pdf 10%, synthetic 5%"
    assert cells[5][6] == "0.1"


def test_the_time_left_counts_tokens_where_updates_grow(run: Path) -> None:
    """Update 4 of the ramp is small: what is left takes as many times longer as it has tokens."""
    row = json.loads((run / "metrics.jsonl").read_text()) | {"step": 4, "global_batch_size": 8, "sequence_length": 128}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    status, timetable = read_status(run, now=1001.0), Timetable(load_recipe("joyai_tiny_stages"))
    updates = [timetable.at(number) for number in range(5, 49)]
    assert status.seconds_left == pytest.approx(sum(update.tokens for update in updates) / (8 * 128))
    assert status.stage_seconds_left == pytest.approx(sum(update.tokens for update in updates[:8]) / (8 * 128))


def test_a_run_without_a_readable_recipe_has_no_panel(tmp_path: Path) -> None:
    assert schedule_panel(tmp_path, 0) == ""
    (tmp_path / "recipe.toml").write_text("[model]\nold_key = 1\n")
    assert schedule_panel(tmp_path, 0) == ""
    assert stage_at(timetable_of(tmp_path), 3) is None


def test_status_names_the_stage_and_its_last_step(run: Path) -> None:
    from rich.console import Console

    status = read_status(run, now=1001.0)
    assert (status.stage, status.stage_last_step) == ("stable", 24)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_status(status))
    assert re.search(r"stage\s+stable\s+its last step\s+24", console.export_text())


def test_a_run_of_one_stage_has_no_stage_to_name(run: Path) -> None:
    (run / "recipe.toml").write_text(dump_recipe(load_recipe("joyai_tiny")))
    assert read_status(run, now=1001.0).stage is None
    assert "<title>" not in schedule_panel(run, 20)
