"""Lines that are noise (menus, notices, share buttons, adverts), found by a trained linear model, line by line.

JoyAI-LLM Flash's report labels lines with a small fine-tuned language model (2.3.1); this is the light form of the
task: logistic regression on hashed words (score/linear.py) over a line's words, its shape, its place in the document
and the lengths of its neighbours, trained with `python -m data_pipeline.clean.train_noise` on documents whose lines
are labelled.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from data_pipeline.score.linear import MODEL, WEIGHTS, LinearScorer, load_linear
from data_pipeline.transform.base import Block, Draft, TransformSection

Share = Annotated[float, Field(ge=0, le=1)]
LONGEST = 400  # characters of a line that are looked at
LENGTHS = (0, 5, 12, 25, 40, 60, 90, 140, 220)
ENDS = {
    ".": "stop",
    "!": "call",
    "?": "ask",
    ":": "colon",
    ",": "comma",
    "…": "dots",
    "。": "stop",
    "！": "call",
    "？": "ask",
}


def _length(line: str | None) -> int:
    return -1 if line is None else sum(len(line) > bound for bound in LENGTHS)


def line_views(lines: Sequence[str]) -> list[str]:
    """What the model sees of each line (none blank): words for shape, place and neighbours, then the line's own."""
    found = []
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else None
        after = lines[number + 1] if number + 1 < len(lines) else None
        words = line.split()
        capitals = sum(word[:1].isupper() for word in words)
        shape = (
            f"zlength{_length(line)} zbefore{_length(before) + 1} zafter{_length(after) + 1}",
            f"zplace{10 * number // len(lines)} zend{ENDS.get(line[-1], 'none')}",
            f"zcapital{4 * capitals // max(1, len(words))} zmarks{min(5, sum(mark in '|›»•·/©>' for mark in line))}",
            f"zdigits{4 * sum(map(str.isdigit, line)) // len(line)}",
        )
        found.append(" ".join((*shape, line[:LONGEST])))
    return found


class NoiseSection(TransformSection):
    """Removes lines that a trained linear model calls noise; statistics: lines looked at and removed."""

    reasons: ClassVar[dict[str, str]] = {"mostly_noise": "more of its characters in noise lines than most"}
    kind: Literal["noise"]
    model: str = Field(description="Folder of a model that train_noise wrote.")
    threshold: Share = Field(0.3, description="A line with a smaller chance to be text goes.")
    most: Share = Field(0.7, description="Documents with a larger share of characters in such lines go.")

    def files(self) -> list[Path]:
        """The model."""
        return [Path(self.model) / MODEL, Path(self.model) / WEIGHTS]

    def make(self) -> Block:
        """The block. Raises UserError when the folder holds no model."""
        return _Noise(self, load_linear(Path(self.model)))


class _Noise(Block):
    def __init__(self, section: NoiseSection, scorer: LinearScorer) -> None:
        self._section, self._scorer = section, scorer

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        lines = draft.text.split("\n")
        solid = [line.strip() for line in lines if line.strip()]
        chances = iter(self._scorer.score(line_views(solid))[:, 0].tolist())
        gone = [bool(line.strip()) and next(chances) < self._section.threshold for line in lines]
        counts["lines"] += len(solid)
        counts["noise_lines"] += sum(gone)
        removed = sum(len(line) for line, noise in zip(lines, gone, strict=True) if noise)
        if removed > self._section.most * sum(map(len, lines)):
            return "mostly_noise"
        if removed:
            draft.text = "\n".join(line for line, noise in zip(lines, gone, strict=True) if not noise).strip("\n")
        return None
