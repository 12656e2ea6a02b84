"""A law that points were made from is found again, its band says how sure that is, and a page shows it."""

import json
from pathlib import Path

import numpy as np
import orjson
import pytest

from megatron_joy.cli.main import main
from megatron_joy.errors import UserError
from megatron_joy.report.fit import Law, Point, fit_law, read_points

TRUTH = Law(floor=1.7, scale=400.0, alpha=0.15)
COMPUTE = np.geomspace(1e17, 1e21, 9)


def points(noise: float, seed: int = 0) -> list[Point]:
    spread = np.random.default_rng(seed).normal(0, noise, len(COMPUTE))
    return [
        Point(f"w{i}", float(c), float(loss))
        for i, (c, loss) in enumerate(zip(COMPUTE, TRUTH.at(COMPUTE) + spread, strict=True))
    ]


def test_a_law_without_noise_is_found_again() -> None:
    law = fit_law(points(0.0), "validation", samples=1).law
    assert law.alpha == pytest.approx(TRUTH.alpha, rel=1e-3)
    assert law.floor == pytest.approx(TRUTH.floor, abs=5e-3)
    assert law.scale == pytest.approx(TRUTH.scale, rel=0.05)
    assert float(law.at(np.array([1e22]))[0]) == pytest.approx(float(TRUTH.at(np.array([1e22]))[0]), abs=1e-3)


def test_the_band_has_the_truth_about_as_often_as_it_says() -> None:
    """Inside the measured range, over 24 draws of the noise: 90 % is promised, below 17 come once in 500 tries."""
    at, inside, widths = np.array([1e19]), 0, []
    for seed in range(24):
        low, high = fit_law(points(0.02, seed), "validation", seed, samples=150).band(at)
        inside += bool(low[0] <= TRUTH.at(at)[0] <= high[0])
        widths.append(float(high[0] - low[0]))
    assert inside >= 17
    assert 0.005 < np.median(widths) < 0.05


def test_more_noise_makes_a_wider_band_and_it_opens_beyond_the_data() -> None:
    near, far = np.array([1e19]), np.array([1e23])
    spans = {noise: fit_law(points(noise), "validation", samples=150) for noise in (0.005, 0.05)}
    width = {n: [float(np.subtract(*fit.band(x)[::-1])[0]) for x in (near, far)] for n, fit in spans.items()}
    assert width[0.05][0] > 4 * width[0.005][0]
    assert width[0.05][1] > 2 * width[0.05][0]


def test_a_loss_that_needs_no_floor_gets_none_below_zero() -> None:
    law = fit_law([Point(str(c), c, 3.0 * (c / 1e17) ** -0.3) for c in COMPUTE], "training", samples=1).law
    assert law.floor == pytest.approx(0.0, abs=0.01)
    assert law.alpha == pytest.approx(0.3, rel=0.02)


def write_point(folder: Path, point: Point, rows: int = 10, **more: float) -> Path:
    """A run whose rows add up to the point's FLOPs, in two halves of different cost, and end at its loss."""
    folder.mkdir()
    (folder / "recipe.toml").write_text('name = "made"\n')
    tokens, lines = 0, []
    for step in range(1, rows + 1):
        cost = (0.5 if step <= rows // 2 else 1.5) * point.compute / (rows * 1000)
        tokens += 1000
        row = {"step": step, "attempt": 0, "time": step, "loss": 9.0, "tokens": tokens, "model_flops_per_token": cost}
        lines.append(row | ({"validation_loss": point.loss} if step == rows else {}) | more)
    (folder / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return folder


def test_points_are_read_from_what_runs_wrote(tmp_path: Path) -> None:
    made = points(0.0)[:4]
    read, kind = read_points([write_point(tmp_path / point.name, point) for point in made])
    assert kind == "validation"
    for found, point in zip(read, made, strict=True):
        assert (found.name, found.loss) == (point.name, point.loss)
        assert found.compute == pytest.approx(point.compute)


def test_the_command_prints_the_constants_and_writes_a_page_that_loads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(write_point(tmp_path / point.name, point)) for point in points(0.002)]
    page = tmp_path / "law.html"
    assert main(["report", "--fit", "--json", "--out", str(page), *folders]) == 0
    value = json.loads(capsys.readouterr().out)
    best, low, high = value["constants"]["alpha"]
    assert low < TRUTH.alpha < high and low < best < high
    text = page.read_text()
    assert text.count("<circle") == len(folders) and "http" not in text.replace("http-equiv", "")
    assert f"{best:.4g}" in text


def test_what_cannot_be_fitted_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [str(write_point(tmp_path / point.name, point)) for point in points(0.0)[:3]]
    assert main(["report", "--fit", *few]) == 2
    assert "needs at least 4" in capsys.readouterr().err
    assert main(["report", *few]) == 2
    assert "needs --fit" in capsys.readouterr().err
    old = write_point(tmp_path / "old", points(0.0)[4], model_flops_per_token=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="does not say the model's FLOPs"):
        read_points([old])
