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

from data_pipeline.transform.base import Block, Draft, TransformSection, require

CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufeff\ufff9-\ufffb]")
LINE_ENDS = re.compile("\r\n?|\x0c|\u2028|\u2029")
BLANK_LINES = re.compile(r"\n{4,}")
REPLACEMENT = "\ufffd"
SIGNS_OF_DAMAGE = re.compile("[\u0080-\u009f\u00c2-\u00f4\u0102-\u0192\u02c6-\u02dd\u2018-\u203a\u20ac\u2122]")


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

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        text = LINE_ENDS.sub("\n", draft.text)
        # Only text with characters of another encoding's bytes can be repaired: looking is a hundred times faster.
        if self._fix is not None and SIGNS_OF_DAMAGE.search(text):
            repaired = "\n".join(self._fix(line) if SIGNS_OF_DAMAGE.search(line) else line for line in text.split("\n"))
            counts["repaired"] += repaired != text
            text = repaired
        text, controls = CONTROLS.subn("", text)
        counts["controls"] += controls
        if self._form != "none" and not unicodedata.is_normalized(self._form, text):
            text = unicodedata.normalize(self._form, text)
            counts["normalised"] += 1
        if text.count(REPLACEMENT) > self._damaged_share * len(text):
            return "unreadable"
        text = "\n".join(line.rstrip() for line in text.split("\n"))
        text = BLANK_LINES.sub("\n\n\n", text).strip("\n")
        draft.text = text
        return None
