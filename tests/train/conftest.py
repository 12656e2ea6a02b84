"""Runs that several tests look at are made once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.minuscule import Outcome, make_home, train

Unbroken = Callable[..., Outcome]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with data and recipe; tests must not change it."""
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def unbroken(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """A run of a layout and overrides from start to end, the same one for all that ask."""
    made: dict[tuple[str, ...], Outcome] = {}

    def get(layout: tuple[str, ...], *overrides: str) -> Outcome:
        key = (*layout, *overrides)
        if key not in made:
            made[key] = train(home, tmp_path_factory.mktemp("unbroken") / "run", layout, *overrides)
            assert set(made[key].codes) == {0}
        return made[key]

    return get
