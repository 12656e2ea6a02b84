"""The transform `code`: rules on a source file's signals, and the gate for licences."""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from data_pipeline.code.languages import language_of
from data_pipeline.code.licence import PERMISSIVE, is_allowed, tagged
from data_pipeline.code.signals import REASONS, Bounds, signals_of, verdict
from data_pipeline.transform.base import Block, Draft, TransformSection
from megatron_joy.recipe.schema import PositiveFloat, PositiveInt

Share = Annotated[float, Field(ge=0, le=1)]
_USUAL = Bounds()


class CodeSection(TransformSection):
    """Drops source files by their signals and licence (arXiv 2604.03044, 2.3.2). Its statistics count languages.

    A bound of 0 is a bound; the rules without a default act only where a value is given.
    """

    version: ClassVar[int] = 2
    reasons: ClassVar[dict[str, str]] = REASONS | {"licence": "a licence that is not allowed, or none"}
    kind: Literal["code"]
    licences: list[str] = Field(
        default_factory=list,
        description='SPDX names that may stay, "permissive" for the usual ones; none: no gate.',
    )
    generated: bool = Field(True, description="Drop what a generator says it made.")
    tests: bool = Field(False, description="Drop test files.")
    must_parse: bool = Field(True, description="Drop what its language's parser refuses, without a preprocessor.")
    longest_line: PositiveInt = Field(_USUAL.longest_line, description="Most characters of a line.")
    mean_line: PositiveFloat = Field(_USUAL.mean_line, description="Most characters of the mean line.")
    least_alphabetic: Share = Field(_USUAL.least_alphabetic, description="Least share of letters.")
    hex_like: Share = Field(_USUAL.hex_like, description="Most share of characters in hexadecimal pieces.")
    encoded: Share = Field(_USUAL.encoded, description="Most share of characters in long encoded runs.")
    duplicate_lines: Share = Field(_USUAL.duplicate_lines, description="Most share of lines that stand earlier.")
    duplicate_ngrams: Share = Field(_USUAL.duplicate_ngrams, description="Most share of 10-grams that stand earlier.")
    data: Share = Field(_USUAL.data, description="Most share of lines that hold literals only.")
    trivial: Share | None = Field(None, description="Most share of prints, assertions, passes; none: no rule.")
    preprocessor: Share | None = Field(None, description="Most share of directives; none: no rule.")

    def make(self) -> Block:
        """The block."""
        return _Code(self)

    def problems(self) -> Iterator[str]:
        """A licence that no expression can name."""
        for name in self.licences:
            if " " in name.strip() or not name.strip():
                yield f"licences: {name!r} is no single SPDX name; list the names one by one"


class _Code(Block):
    def __init__(self, section: CodeSection) -> None:
        values = section.model_dump(include=set(Bounds.__dataclass_fields__))
        self._bounds = Bounds(**values)
        named = [PERMISSIVE if name == "permissive" else (name,) for name in section.licences]
        self._licences = tuple(name for names in named for name in names)

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        language = language_of(draft.path)
        counts[language.name if language else "other"] += 1
        if language is not None:  # a repository's document begins with one of its files, which can't speak for all
            draft.licence = tagged(draft.text) or draft.licence
        if self._licences and not is_allowed(draft.licence, self._licences):
            return "licence"
        return verdict(signals_of(draft.text, draft.path), self._bounds)
