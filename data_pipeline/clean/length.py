"""Length in characters: what is too short says nothing, what is too long is seldom text."""

from collections import Counter
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from data_pipeline.transform.base import Block, Draft, TransformSection
from megatron_joy.recipe.schema import NonNegativeInt, PositiveInt


class LengthSection(TransformSection):
    """Drops documents by their number of characters. JoyAI-LLM Flash's report prints no bound; 200 is ours."""

    reasons: ClassVar[dict[str, str]] = {"short": "fewer characters than least", "long": "more characters than most"}
    kind: Literal["length"]
    least: NonNegativeInt = Field(200, description="Fewest characters of a document.")
    most: PositiveInt | None = Field(None, description="Most characters; none: no bound.")

    def make(self) -> Block:
        """The block."""
        return _Length(self)

    def problems(self) -> Iterator[str]:
        """A range without anything in it."""
        if self.most is not None and self.most < self.least:
            yield f"most = {self.most}: below least = {self.least}; nothing would be left"


class _Length(Block):
    def __init__(self, section: LengthSection) -> None:
        self._least, self._most = section.least, section.most

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        size = len(draft.text)
        if size < self._least:
            return "short"
        return "long" if self._most is not None and size > self._most else None
