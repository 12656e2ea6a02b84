"""Kills at random moments, checkpoints on their way: no bit differs. `benchmarks/chaos.py` does many more."""

import random
from pathlib import Path

import pytest

from tests.train.chaos import Case, endure
from tests.train.minuscule import EP2, EP2_MUON, make_staged_home


@pytest.mark.parametrize("layout", [EP2, EP2_MUON], ids=["adamw", "muon"])
def test_random_kills_with_checkpoints_on_their_way_change_no_bit(tmp_path: Path, layout: tuple[str, ...]) -> None:
    home = make_staged_home(tmp_path / "home")
    generator = random.Random(seed := random.randrange(10**6))
    print(f"seed {seed}")
    case = Case("test")
    for _ in endure(home, tmp_path, layout, case, kills=2, generator=generator):
        pass
    assert case.differences == []
    assert len(case.hits) >= 2
