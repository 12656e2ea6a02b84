"""What a scorer is, and selection by thresholds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]


class Scorer(Protocol):
    """Gives each text a number for each of its columns; higher is better unless the column's name says what it is."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""

    def score(self, texts: Sequence[str]) -> Scores:
        """float32 [texts, columns]; NaN where a score could not be had."""


@dataclass(frozen=True)
class Bounds:
    """What is kept: least <= score < below; a missing (NaN) score is below everything."""

    least: float = -np.inf
    below: float = np.inf


def reasons(columns: Sequence[str], scores: Scores, bounds: Mapping[str, Bounds]) -> list[str | None]:
    """For each text why it is dropped, `score_<column>` of the first bound that it misses, or None.

    scores: float32 [texts, columns]. Raises KeyError for a bound on a column that is not there.
    """
    found: list[str | None] = [None] * len(scores)
    places = {name: place for place, name in enumerate(columns)}
    for name, bound in reversed(list(bounds.items())):
        values = scores[:, places[name]]
        missed = ~((values >= bound.least) & (values < bound.below))
        for number in np.flatnonzero(missed).tolist():
            found[number] = f"score_{name}"
    return found
