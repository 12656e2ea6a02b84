"""C4's rules (Raffel et al. 2020, section 2.2), line by line: what is left is prose, menus and notices go.

A line stays that ends in a terminal mark, has three words and no word of a thousand characters, and speaks neither of
JavaScript nor of cookies and policies. A page goes that has a curly bracket or "lorem ipsum" in such a line, or fewer
than five sentences left. Sentences are nltk's Punkt, without a download.
"""

import re
from collections import Counter
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from data_pipeline.clean.words import count_sentences
from data_pipeline.native.library import kernels
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
        self._words, self._sentences = section.words, section.sentences
        self._terminal, self._brackets = section.terminal, section.brackets

    def _line_reason(self, raw: str, line: str) -> str | None:
        """Why a line goes, or with one of the section's reasons the page; None when it stays. raw: with citations."""
        if len(raw) > LONGEST_WORD and any(len(word) > LONGEST_WORD for word in raw.split()):
            return "long_word"
        if self._terminal and (not line.endswith(ENDS) or line.endswith("...")):
            return "no_end"
        if len(raw.split(None, self._words - 1)) < self._words:  # nothing is split behind the last word that is wanted
            return "few_words"
        lower = line.lower()
        if "lorem ipsum" in lower:
            return "lorem_ipsum"
        if "javascript" in lower:
            return "javascript"
        if self._brackets and "{" in line:
            return "curly_bracket"
        if ("cookie" in lower or "policy" in lower or "terms of use" in lower) and any(
            policy in lower for policy in POLICIES
        ):
            return "policy"
        return None

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        content, kept, page = draft.text.encode(), [], None
        asked, endless = lines_to_read(content, not self._terminal)
        for place, (start, end) in enumerate(asked):
            raw = content[start:end].decode()
            line = raw.strip()
            if "[" in line:
                line = CITATIONS.sub("", line)
            reason = self._line_reason(raw, line)
            if reason is None:
                kept.append(line)
            elif reason in C4Section.reasons:
                page, endless = (
                    reason,
                    len(content[:start].decode().splitlines()) - place,
                )  # what is behind is not counted
                break
            else:
                counts[f"lines_{reason}"] += 1
        if endless:
            counts["lines_no_end"] += endless
        if page is None and not have_sentences(kept, self._sentences):
            page = "few_sentences"
        if page is None:
            draft.text = "\n".join(kept).strip()
        return page


def lines_to_read(content: bytes, every: bool) -> tuple[list[list[int]], int]:
    """Begin and end of lines that may end in a terminal mark (or of every line), and how many others there are."""
    lines, total = np.empty((len(content), 2), dtype=np.uint64), np.zeros(1, dtype=np.int64)
    count = kernels().joy_c4_lines(content, len(content), every, LONGEST_WORD, lines.ctypes.data, total.ctypes.data)
    return lines[:count].tolist(), int(total[0]) - count


def have_sentences(lines: list[str], wanted: int) -> bool:
    """Whether lines have so many sentences together. One that is not blank has at least one, so that the algorithm is
    asked only where lines are fewer than what is wanted, and not for more than is missing.
    """
    prose = [line for line in lines if line.strip()]
    missing = wanted - len(prose)
    for line in prose:
        if missing <= 0:
            break
        missing -= count_sentences(line, missing + 1) - 1
    return missing <= 0
