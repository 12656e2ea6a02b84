"""The drawn curve is that of the bands in use."""

import re
from pathlib import Path

import pytest

from data_pipeline.dedup.bands import BANDS, candidate_probability
from data_pipeline.dedup.minhash import PERMUTATIONS

FIGURE = Path(__file__).parents[3] / "docs" / "figures" / "dedup_bands.svg"


def test_the_figure_shows_the_bands_in_use() -> None:
    text = FIGURE.read_text(encoding="utf-8")
    assert f">{BANDS} x {PERMUTATIONS // BANDS} (ours)<" in text
    curves = [line.split("L") for line in re.findall(r'<path d="M([^"v]*)" fill="none"', text)]
    assert [len(points) for points in curves] == [201] * 3
    drawn = [[float(point.split()[1]) for point in points] for points in curves]
    low, high = max(map(max, drawn)), min(map(min, drawn))  # y counts from the top: of the least chance, of the largest
    cuts = ((BANDS, PERMUTATIONS // BANDS), (9, 14), (8, 16))
    chances = [[candidate_probability(0.5 + step / 400, *cut) for step in range(201)] for cut in cuts]
    least, largest = min(map(min, chances)), max(map(max, chances))
    for y, chance in zip(drawn[0], chances[0], strict=True):
        assert least + (low - y) / (low - high) * (largest - least) == pytest.approx(chance, abs=2e-4)


def test_values_of_the_curve_from_its_formula() -> None:
    assert candidate_probability(0.9, 16, 8) == pytest.approx(0.99988, abs=1e-5)
    assert candidate_probability(0.8, 16, 8) == pytest.approx(0.9470, abs=1e-4)
    assert candidate_probability(0.9, 8, 16) == pytest.approx(0.8059, abs=1e-3)
