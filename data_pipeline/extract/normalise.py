"""Text made regular: broken encodings repaired, one Unicode form, no control characters, no runs of blank lines.

Repair is ftfy's (Speer 2019): text that was provably decoded as the wrong encoding becomes what it was ("schÃ¶n" ->
"schön"); characters that say nothing (controls, byte order marks in the middle) go. NFC is the form that the web and
tokenizers expect; NFKC would change formulas and Chinese punctuation.
"""

import re
import unicodedata
from collections import Counter
from typing import Any, ClassVar, Literal

from pydantic import Field

from data_pipeline.extract.survey import (
    BLANK_LINES,
    CONTROL,
    DAMAGE,
    LINE_END,
    SETS,
    SUSPICION,
    SUSPICIOUS,
    TRAILING,
    UNCOMPOSED,
    survey,
)
from data_pipeline.transform.base import Block, Draft, TransformSection, require

CONTROLS, SIGNS_OF_DAMAGE = re.compile(SETS[CONTROL]), re.compile(SETS[DAMAGE])
LINE_ENDS = re.compile("\r\n?|\x0c|\u2028|\u2029")
BLANK_LINES_TOGETHER = re.compile(r"\n{4,}")
REPLACEMENT = "\ufffd"


class NormaliseSection(TransformSection):
    """Encoding repair (ftfy), Unicode form, control characters, line ends and blank lines."""

    reasons: ClassVar[dict[str, str]] = {"unreadable": "more characters lost in decoding than damaged_share"}
    kind: Literal["normalise"]
    repair: bool = Field(True, description="Repair text decoded as the wrong encoding, with ftfy.")
    form: Literal["NFC", "NFKC", "none"] = Field("NFC", description="Unicode normal form.")
    damaged_share: float = Field(
        0.01, ge=0, le=1, description="Documents with more U+FFFD (per character) than this go."
    )

    def make(self) -> Block:
        """The block. Raises UserError when ftfy is wanted and not installed."""
        return _Normalise(self)


class _Normalise(Block):
    def __init__(self, section: NormaliseSection) -> None:
        self._form: Any = section.form
        self._damaged_share = section.damaged_share
        self._fix: Any = None
        if section.repair:
            require("ftfy", "transform normalise with repair = true")
            import ftfy

            self._fix = ftfy.fix_encoding

    def _repaired(self, text: str) -> str:
        """Lines with a sign of damage that ftfy can object to are given to it, which takes a hundred times as long."""
        parts, place = [], 0
        found = SUSPICION.search(text)
        while found:
            start, end = text.rfind("\n", 0, found.start()) + 1, text.find("\n", found.end())
            end = end if end >= 0 else len(text)
            if SIGNS_OF_DAMAGE.search(text, start, end):
                parts += [text[place:start], self._fix(text[start:end])]
                place = end
            found = SUSPICION.search(text, end)
        return "".join([*parts, text[place:]])

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        text, has = draft.text, survey(draft.text)
        if has & LINE_END:
            text = LINE_ENDS.sub("\n", text)
            has = survey(text)
        if self._fix is not None and has & DAMAGE:
            repaired = self._repaired(text) if has & SUSPICIOUS else text
            counts["repaired"] += repaired != text
            if repaired != text:
                text, has = repaired, survey(repaired)
        controls = 0
        if has & CONTROL:
            text, controls = CONTROLS.subn("", text)
        counts["controls"] += controls
        normal = self._normal(text, has, counts)
        if normal.count(REPLACEMENT) > self._damaged_share * len(normal):
            return "unreadable"
        draft.text = without_trailing_blanks(normal, survey(normal) if controls or normal is not text else has)
        return None

    def _normal(self, text: str, has: int, counts: Counter[str]) -> str:
        """The text in the Unicode form that is wanted; only NFC is known to be there without asking."""
        if self._form == "none" or (self._form == "NFC" and not has & UNCOMPOSED) or text.isascii():
            return text
        if unicodedata.is_normalized(self._form, text):
            return text
        counts["normalised"] += 1
        return unicodedata.normalize(self._form, text)


def without_trailing_blanks(text: str, has: int) -> str:
    """No blanks at the end of a line, no more than two blank lines together, none at the beginning and the end."""
    if has & TRAILING:
        text = "\n".join(map(str.rstrip, text.split("\n")))
    if has & (TRAILING | BLANK_LINES):
        text = BLANK_LINES_TOGETHER.sub("\n\n\n", text)
    return text.strip("\n")
