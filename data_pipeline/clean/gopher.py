"""Gopher's rules (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1): quality by counting, and repetition (table A1).

The thresholds are the paper's. Words are those of clean/words.py. The rules are made for languages with spaces between
words; `languages` keeps them to those.
"""

from collections import Counter
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from data_pipeline.clean.repeats import Grams, repeated_parts
from data_pipeline.clean.tally import Words, count_words, utf8
from data_pipeline.clean.words import ELLIPSES
from data_pipeline.transform.base import Block, Draft, TransformSection
from megatron_joy.recipe.schema import NonNegativeFloat, NonNegativeInt, PositiveInt

TOP_GRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))
REPEATED_GRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))


class GopherQualitySection(TransformSection):
    """Gopher's quality rules: word counts and lengths, symbols, bullets, ellipses, letters, stop words."""

    reasons: ClassVar[dict[str, str]] = {
        "few_words": "fewer words than least_words",
        "many_words": "more words than most_words",
        "short_words": "mean word length below shortest_mean",
        "long_words": "mean word length above longest_mean",
        "hashes": "more # per word than symbols",
        "ellipses": "more ellipses per word than symbols",
        "bullets": "more lines that begin with a bullet than bullets",
        "ellipsis_lines": "more lines that end with an ellipsis than ellipsis_lines",
        "letters": "fewer words with a letter than letters",
        "stop_words": "fewer different stop words than stop_words",
    }
    kind: Literal["gopher_quality"]
    least_words: NonNegativeInt = Field(50, description="Fewest words, marks not counted.")
    most_words: PositiveInt = Field(100_000, description="Most words.")
    shortest_mean: NonNegativeFloat = Field(3.0, description="Least mean length of words, in characters.")
    longest_mean: NonNegativeFloat = Field(10.0, description="Greatest mean length of words.")
    symbols: NonNegativeFloat = Field(0.1, description="Most # per word, and most ellipses.")
    bullets: NonNegativeFloat = Field(0.9, description="Largest share of lines that begin with a bullet.")
    ellipsis_lines: NonNegativeFloat = Field(0.3, description="Largest share of lines that end with an ellipsis.")
    letters: NonNegativeFloat = Field(0.8, description="Least share of words with a letter.")
    stop_words: NonNegativeInt = Field(2, description="Least number of different English stop words; 0 elsewhere.")

    def make(self) -> Block:
        """The block."""
        return _Quality(self)

    def problems(self) -> Iterator[str]:
        """Ranges without anything in them."""
        for most, least in (("most_words", "least_words"), ("longest_mean", "shortest_mean")):
            above, below = getattr(self, most), getattr(self, least)
            if above < below:
                yield f"{most} = {above}: below {least} = {below}; nothing would be left"


class _Quality(Block):
    def __init__(self, section: GopherQualitySection) -> None:
        self._section = section

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        own, found = self._section, count_words(draft.text)
        if found.real < max(1, own.least_words):
            return "few_words"
        if found.real > own.most_words:
            return "many_words"
        mean = found.characters / found.real
        if mean < own.shortest_mean:
            return "short_words"
        if mean > own.longest_mean:
            return "long_words"
        return self._symbols(draft.text, found.words) or self._shares(found)

    def _symbols(self, text: str, words: int) -> str | None:
        most = self._section.symbols * words
        if text.count("#") > most:
            return "hashes"
        return "ellipses" if sum(map(text.count, ELLIPSES)) > most else None

    def _shares(self, found: Words) -> str | None:
        own = self._section
        if found.bullets > own.bullets * found.lines:
            return "bullets"
        if found.ellipses > own.ellipsis_lines * found.lines:
            return "ellipsis_lines"
        if found.lettered < own.letters * found.words:
            return "letters"
        return "stop_words" if found.stop_words < own.stop_words else None


class GopherRepetitionSection(TransformSection):
    """Gopher's repetition rules: shares of repeated lines, paragraphs and n-grams of 2 to 10 words (table A1)."""

    reasons: ClassVar[dict[str, str]] = {
        "paragraphs": "share of repeated paragraphs",
        "paragraph_characters": "share of characters in repeated paragraphs",
        "lines": "share of repeated lines",
        "line_characters": "share of characters in repeated lines",
        "top_grams": "share of characters in the most frequent 2-, 3- or 4-gram",
        "repeated_grams": "share of characters in repeated 5- to 10-grams",
    }
    kind: Literal["gopher_repetition"]
    parts: NonNegativeFloat = Field(0.3, description="Largest share of repeated lines, and of paragraphs.")
    characters: NonNegativeFloat = Field(0.2, description="Largest share of characters in them.")
    grams: NonNegativeFloat = Field(1.0, description="Factor on the paper's bounds for n-grams.")

    def make(self) -> Block:
        """The block."""
        return _Repetition(self)


class _Repetition(Block):
    def __init__(self, section: GopherRepetitionSection) -> None:
        self._section = section

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        content, size = utf8(draft.text), len(draft.text)
        for name, found in zip(("paragraph", "line"), repeated_parts(content), strict=True):
            if found.repeats > self._section.parts * found.parts:
                return f"{name}s"
            if found.characters > self._section.characters * size:
                return f"{name}_characters"
        return self._grams(Grams.of_text(content), size)

    def _grams(self, grams: Grams, size: int) -> str | None:
        most = self._section.grams * size
        for n, share in TOP_GRAMS:
            if grams.at_most(n) > share * most:
                times, characters = grams.most_frequent(n)
                if times * characters > share * most:
                    return "top_grams"
        covered = grams.covered_characters(REPEATED_GRAMS[0][0])
        if any(covered > share * most and grams.repeated_characters(n) > share * most for n, share in REPEATED_GRAMS):
            return "repeated_grams"
        return None
