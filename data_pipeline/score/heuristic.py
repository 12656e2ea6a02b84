"""Scores by counting, without a model: what text looks like that was written to be read.

The quantities are those of Gopher's rules (Rae et al. 2021, table A1), as numbers instead of verdicts.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from data_pipeline.clean.tally import count_runs
from data_pipeline.score.base import Scores

SAMPLE = 20_000  # characters looked at: enough to judge, and long documents cost no more than others


class HeuristicScorer:
    """Columns: letters (share of characters), mean_word (length), unique_lines (share), stop_words (share of words; of
    Chinese the share of Han characters), compression (bytes of the text for each byte of zlib's result).
    """

    columns = ("letters", "mean_word", "unique_lines", "stop_words", "compression")

    def score(self, texts: Sequence[str]) -> Scores:
        """float32 [texts, 5]; zeros for an empty text."""
        return np.array([self._one(text[:SAMPLE]) for text in texts], dtype=np.float32).reshape(-1, len(self.columns))

    def _one(self, text: str) -> tuple[float, ...]:
        found = count_runs(text)
        if not found.runs:
            return (0.0,) * len(self.columns)
        lines = [line for line in (line.strip() for line in text.split("\n")) if line]
        raw = text.encode()
        return (
            found.letters / len(text),
            found.characters / found.runs,
            len(set(lines)) / len(lines),
            max(found.han / len(text), found.stop_words / found.runs),
            len(raw) / len(zlib.compress(raw, 1)),
        )
