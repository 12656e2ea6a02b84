"""FineWeb's own rules (Penedo et al. 2024, arXiv 2406.17557, section 3.6), with the paper's thresholds."""

from collections import Counter
from typing import ClassVar, Literal

from pydantic import Field

from data_pipeline.clean.tally import count_words
from data_pipeline.clean.words import duplicate_share
from data_pipeline.transform.base import Block, Draft, TransformSection
from megatron_joy.recipe.schema import NonNegativeFloat, NonNegativeInt

ENDS = tuple(".!?\"'”’»…。！？；：」』》）)")


class FinewebSection(TransformSection):
    """FineWeb's rules: lines that end in a mark, short lines, characters in repeated lines, line breaks per word."""

    reasons: ClassVar[dict[str, str]] = {
        "line_ends": "fewer lines that end in a terminal mark than line_ends",
        "short_lines": "more lines of short_line characters than short_lines",
        "repeated_lines": "more characters in repeated lines than repeated",
        "list": "more line breaks per word than breaks",
    }
    kind: Literal["fineweb"]
    line_ends: NonNegativeFloat = Field(0.12, description="Least share of lines that end in a terminal mark.")
    short_line: NonNegativeInt = Field(30, description="A line of up to so many characters is short.")
    short_lines: NonNegativeFloat = Field(0.67, description="Largest share of short lines.")
    repeated: NonNegativeFloat = Field(0.01, description="Largest share of characters in repeated lines.")
    breaks: NonNegativeFloat = Field(0.3, description="Most line breaks per word.")

    def make(self) -> Block:
        """The block."""
        return _Fineweb(self)


class _Fineweb(Block):
    def __init__(self, section: FinewebSection) -> None:
        self._section = section

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        own, text = self._section, draft.text
        lines = [line for line in text.split("\n") if line.strip()]
        if sum(line.endswith(ENDS) for line in lines) < own.line_ends * len(lines):
            return "line_ends"
        if sum(len(line) <= own.short_line for line in lines) > own.short_lines * len(lines):
            return "short_lines"
        breaks = text.count("\n")
        if duplicate_share(lines)[1] > own.repeated * (len(text) - breaks):
            return "repeated_lines"
        return "list" if breaks > own.breaks * count_words(text).words else None
