"""C4's rules (Raffel et al. 2020, section 2.2), line by line: what is left is prose, menus and notices go.

A line stays that ends in a terminal mark, has three words and no word of a thousand characters, and speaks neither of
JavaScript nor of cookies and policies. A page goes that has a curly bracket or "lorem ipsum" in such a line, or fewer
than five sentences left. Sentences are nltk's Punkt, without a download.
"""

import re
from collections import Counter
from typing import ClassVar, Literal

from pydantic import Field

from data_pipeline.clean.words import count_sentences
from data_pipeline.transform.base import Block, Draft, TransformSection, require
from megatron_joy.recipe.schema import NonNegativeInt

CITATIONS = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
ENDS = (".", "?", "!", '"', "'")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
LONGEST_WORD = 1000


class C4Section(TransformSection):
    """C4's line and page rules, citations removed; statistics: lines that went, by reason."""

    reasons: ClassVar[dict[str, str]] = {
        "lorem_ipsum": "placeholder text",
        "curly_bracket": "a line of text with a curly bracket: code",
        "few_sentences": "fewer sentences left than sentences",
    }
    kind: Literal["c4"]
    sentences: NonNegativeInt = Field(5, description="Fewest sentences of what is left.")
    words: NonNegativeInt = Field(3, description="Fewest words of a line.")
    terminal: bool = Field(True, description="Lines must end in a terminal mark.")
    brackets: bool = Field(True, description="Pages with a curly bracket go.")

    def make(self) -> Block:
        """The block. Raises UserError when nltk is not installed."""
        require("nltk", "transform c4")
        return _C4(self)


class _C4(Block):
    def __init__(self, section: C4Section) -> None:
        self._section = section

    def _line_reason(self, line: str, words: list[str]) -> str | None:
        """Why a line goes, None when it stays."""
        if any(len(word) > LONGEST_WORD for word in words):
            return "long_word"
        if self._section.terminal and (not line.endswith(ENDS) or line.endswith("...")):
            return "no_end"
        return "few_words" if len(words) < self._section.words else None

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        kept, sentences = [], 0
        for raw in draft.text.splitlines():
            words = raw.split()
            line = CITATIONS.sub("", raw.strip())
            reason = self._line_reason(line, words)
            if reason is None:
                lower = line.lower()
                if "lorem ipsum" in lower:
                    return "lorem_ipsum"
                if "javascript" in lower:
                    reason = "javascript"
                elif self._section.brackets and "{" in line:
                    return "curly_bracket"
                elif any(policy in lower for policy in POLICIES):
                    reason = "policy"
            if reason is None:
                sentences += count_sentences(line)
                kept.append(line)
            else:
                counts[f"lines_{reason}"] += 1
        if sentences < self._section.sentences:
            return "few_sentences"
        draft.text = "\n".join(kept).strip()
        return None
