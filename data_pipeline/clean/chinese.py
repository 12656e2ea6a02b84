"""Rules for Chinese, where words have no spaces: JoyAI-LLM Flash's report speaks of separate rules and prints none.

These are ours, made after Gopher's: the same questions, asked of characters and of clauses between marks.
"""

import re
from collections import Counter
from typing import ClassVar, Literal

from pydantic import Field

from data_pipeline.clean.repeats import Grams
from data_pipeline.clean.words import HAN, duplicate_share
from data_pipeline.transform.base import Block, Draft, TransformSection
from megatron_joy.recipe.schema import NonNegativeFloat, NonNegativeInt

CLAUSES = re.compile(r"[，。！？；：、,.!?;:\n…]+")
# The most frequent characters of written Chinese, simplified and traditional: prose can't do without most of them.
FUNCTION_CHARACTERS = frozenset("的一是不了在有人我他这這为為之来來个個中上大到说說们們也就")
LONG_GRAM = 10


class ChineseSection(TransformSection):
    """Rules for Chinese: Han characters, function characters, length of clauses, repeated lines and 10-grams."""

    reasons: ClassVar[dict[str, str]] = {
        "few_characters": "fewer Han characters than least",
        "han_share": "a smaller share of Han characters than han",
        "function_characters": "fewer different function characters than functions",
        "long_clauses": "a mean clause longer than longest_clause: no marks, as in lists of key words",
        "short_clauses": "a mean clause shorter than shortest_clause: menus and tables",
        "repeated_lines": "a larger share of characters in repeated lines than repeated",
        "repeated_grams": "a larger share of characters in repeated 10-grams than grams",
    }
    kind: Literal["chinese"]
    least: NonNegativeInt = Field(100, description="Fewest Han characters.")
    han: NonNegativeFloat = Field(0.4, description="Least share of Han among characters that are not white space.")
    functions: NonNegativeInt = Field(5, description="Fewest different function characters.")
    shortest_clause: NonNegativeFloat = Field(3.0, description="Least mean length of clauses, in characters.")
    longest_clause: NonNegativeFloat = Field(60.0, description="Greatest mean length of clauses.")
    repeated: NonNegativeFloat = Field(0.2, description="Largest share of characters in repeated lines.")
    grams: NonNegativeFloat = Field(0.2, description="Largest share of characters in repeated 10-grams.")

    def make(self) -> Block:
        """The block."""
        return _Chinese(self)


class _Chinese(Block):
    def __init__(self, section: ChineseSection) -> None:
        self._section = section

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        own, text = self._section, draft.text
        han, solid = len(HAN.findall(text)), "".join(text.split())
        if han < own.least:
            return "few_characters"
        if han < own.han * len(solid):
            return "han_share"
        if len(FUNCTION_CHARACTERS.intersection(text)) < own.functions:
            return "function_characters"
        clauses = [clause for clause in CLAUSES.split(text) if clause.strip()]
        mean = sum(map(len, clauses)) / max(1, len(clauses))
        if mean > own.longest_clause:
            return "long_clauses"
        if mean < own.shortest_clause:
            return "short_clauses"
        lines = [line for line in text.split("\n") if line.strip()]
        if duplicate_share(lines)[1] > own.repeated * len(text):
            return "repeated_lines"
        repeated = Grams.of_words(solid).repeated_characters(LONG_GRAM)
        return "repeated_grams" if repeated > own.grams * len(solid) else None
