"""HTML to its main text, with trafilatura as in JoyAI-LLM Flash's report (section 2.3.1) or with resiliparse.

trafilatura (Barbaresi 2021) finds the main text by rules and falls back on two other algorithms; resiliparse
(Bevendorff et al. 2018) is an order of magnitude faster and coarser. docs/results/extraction.md compares them.

The parser is C code that no signal interrupts, so pages go through a child process (child.py): one that takes more than
`seconds` of processor time is killed with it and goes as `too_slow`, a page that crashes the parser as `crashed`.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar, Literal

from pydantic import Field

from data_pipeline.extract.child import Extractor
from data_pipeline.transform.base import Block, Draft, TransformSection, require
from megatron_joy.recipe.schema import NonNegativeInt, PositiveFloat


class ExtractSection(TransformSection):
    """HTML to its main text by trafilatura (favouring precision) or resiliparse, with a time limit for each page."""

    reasons: ClassVar[dict[str, str]] = {
        "no_text": "no main text was found",
        "short": "a main text of fewer than least characters",
        "too_slow": "a page that took longer than seconds",
        "crashed": "a page that ended the extractor's process",
    }
    takes_html: ClassVar[bool] = True
    kind: Literal["extract"]
    engine: Literal["trafilatura", "resiliparse"] = Field("trafilatura", description="What finds the main text.")
    favour: Literal["precision", "balance", "recall"] = Field(
        "precision", description="trafilatura: leave doubtful parts out, or keep them."
    )
    least: NonNegativeInt = Field(200, description="Fewest characters of a main text.")
    seconds: PositiveFloat = Field(10.0, description="Processor time that one page may take.")

    def problems(self) -> Iterator[str]:
        """A setting of the other engine."""
        if self.engine == "resiliparse" and "favour" in self.model_fields_set:
            yield 'favour: has no effect with engine = "resiliparse"; remove it'

    def make(self) -> Block:
        """The block. Raises UserError when the engine is not installed."""
        require(self.engine, f"transform extract with engine = {self.engine!r}")
        return _Extract(self)


class _Extract(Block):
    def __init__(self, section: ExtractSection) -> None:
        self._section = section

    @cached_property
    def _extractor(self) -> Extractor:
        return Extractor(self._section.engine, self._section.favour, self._section.seconds)

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        outcome, text = self._extractor.extract(draft.text)
        if outcome != "text":
            return outcome
        if not text.strip():
            return "no_text"
        draft.text = text
        return "short" if len(text) < self._section.least else None
