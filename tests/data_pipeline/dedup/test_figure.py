"""The drawn curve is that of the bands in use."""

import re
from pathlib import Path

import pytest

from data_pipeline.dedup.bands import BANDS, candidate_probability
from data_pipeline.dedup.minhash import PERMUTATIONS

FIGURE = Path(__file__).parents[3] / "docs" / "dedup_bands.svg"


def test_the_figure_shows_the_bands_in_use() -> None:
    text = FIGURE.read_text(encoding="utf-8")
    assert f">{BANDS} x {PERMUTATIONS // BANDS} (ours)<" in text
    points = re.findall(r'<polyline points="([^"]*)"', text)[0].split()
    assert len(points) == 201
    for step, point in enumerate(points):
        chance = 1 - (float(point.split(",")[1]) - 20) / 300
        assert chance == pytest.approx(candidate_probability(0.5 + step / 400, BANDS, PERMUTATIONS // BANDS), abs=2e-4)


def test_values_of_the_curve_from_its_formula() -> None:
    assert candidate_probability(0.9, 16, 8) == pytest.approx(0.99988, abs=1e-5)
    assert candidate_probability(0.8, 16, 8) == pytest.approx(0.9470, abs=1e-4)
    assert candidate_probability(0.9, 8, 16) == pytest.approx(0.8059, abs=1e-3)
