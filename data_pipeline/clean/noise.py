"""Lines that are noise (menus, notices, share buttons, adverts), found by a trained linear model, line by line.

JoyAI-LLM Flash's report labels lines with a small fine-tuned language model (2.3.1); this is the light form of the
task: logistic regression on hashed words (score/linear.py) over a line's words, its shape, its place in the document
and the lengths of its neighbours, trained with `python -m data_pipeline.clean.train_noise` on documents whose lines
are labelled.
"""

from collections import Counter
from functools import cache
from itertools import compress
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from data_pipeline.dedup.words import WORDS_A_BYTE, folding
from data_pipeline.native.library import kernels
from data_pipeline.score.base import Scores
from data_pipeline.score.linear import MODEL, WEIGHTS, LinearScorer, Places, load_linear
from data_pipeline.transform.base import Block, Draft, TransformSection

Share = Annotated[float, Field(ge=0, le=1)]
POINTS = 0x110000
# What a character is to the kernel, as in native/linear.c: bits, and above them what a line has at its end.
BLANK, CAPITAL, DIGIT, MARK = (1 << bit for bit in range(4))
END_SHIFT = 4
STOP, CALL, ASK, COLON, COMMA, DOTS = range(1, 7)
ENDS = {".": STOP, "。": STOP, "!": CALL, "！": CALL, "?": ASK, "？": ASK, ":": COLON, ",": COMMA, "…": DOTS}
MARKS = "|›»•·/©>"
SHAPE = 8  # words for a line's shape, in front of its own


@cache
def _classes() -> npt.NDArray[np.uint8]:
    """uint8 [POINTS]; a sixth of a second, once for each process."""
    every = np.arange(POINTS, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    table = np.zeros(POINTS, dtype=np.uint8)
    for bit, holds in ((BLANK, str.isspace), (CAPITAL, str.isupper), (DIGIT, str.isdigit)):
        table |= np.fromiter(map(holds, every), np.bool_, POINTS) * np.uint8(bit)
    table[list(map(ord, MARKS))] |= np.uint8(MARK)
    for character, end in ENDS.items():
        table[ord(character)] |= np.uint8(end << END_SHIFT)
    return table


@cache
def _tables() -> tuple[int, int, int, int]:
    return *folding().addresses, _classes().ctypes.data


def line_features(text: str, bits: int) -> list[Places]:
    """What the model sees of each line that is not blank, for training: places, ascending, each once."""
    content, lines = text.encode(), text.count("\n") + 1
    ends = np.empty(lines, dtype=np.int64)
    places = np.empty(2 * (WORDS_A_BYTE * len(content) + (SHAPE + 1) * lines), dtype=np.uint32)
    where = (*_tables(), bits, places.ctypes.data, ends.ctypes.data)
    solid = kernels().joy_line_places(content, len(content), *where)
    if solid < 0:
        raise MemoryError
    return [np.sort(part) for part in np.split(places, ends[:solid])[:-1]]


def line_chances(scorer: LinearScorer, text: str) -> tuple[Scores, int]:
    """Each line's chance to be text, float32 [lines], NaN for blank ones; and how many are not blank."""
    content, sums = text.encode(), np.empty(text.count("\n") + 1, dtype=np.float64)
    where = (*_tables(), scorer.bits, scorer.address, len(sums), sums.ctypes.data)
    solid = kernels().joy_line_sums(content, len(content), *where)
    if solid < 0:
        raise MemoryError
    return scorer.chances(sums), solid


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
        return _Noise(self, load_linear(Path(self.model), "data_pipeline.clean.train_noise"))


class _Noise(Block):
    def __init__(self, section: NoiseSection, scorer: LinearScorer) -> None:
        self._section, self._scorer = section, scorer

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        chances, solid = line_chances(self._scorer, draft.text)
        noise = chances < np.float64(self._section.threshold)  # a plain float would be rounded to 32 bits first
        found = int(np.count_nonzero(noise))
        counts["lines"] += solid
        counts["noise_lines"] += found
        if not found:
            return None
        lines = draft.text.split("\n")
        removed = sum(map(len, compress(lines, noise.tolist())))
        if removed > self._section.most * sum(map(len, lines)):
            return "mostly_noise"
        draft.text = "\n".join(compress(lines, (~noise).tolist())).strip("\n")
        return None
