"""The line filter in plain Python: words for a line's shape in front of its own, judged by a linear model."""

from collections.abc import Sequence

import numpy as np

from tests.data_pipeline.score.slow_linear import chance

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


def line_views(text: str) -> list[str]:
    """What the model sees of each line that is not blank: words for shape, place and neighbours, then its own."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
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


def filtered(
    text: str, weights: np.ndarray, bias: float, threshold: float, most: float
) -> tuple[str | None, str, Sequence[float]]:
    """Why a document goes, its text without noise, and the chances of its lines that are not blank."""
    chances = [float(np.float32(chance(view, weights, bias))) for view in line_views(text)]
    left, lines = iter(chances), text.split("\n")
    gone = [bool(line.strip()) and next(left) < threshold for line in lines]
    removed = sum(len(line) for line, noise in zip(lines, gone, strict=True) if noise)
    if removed > most * len("".join(lines)):
        return "mostly_noise", text, chances
    if removed:
        text = "\n".join(line for line, noise in zip(lines, gone, strict=True) if not noise).strip("\n")
    return None, text, chances
