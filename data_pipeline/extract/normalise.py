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
ASCII_CONTROLS = bytes(code for code in range(0x80) if CONTROLS.match(chr(code)))
# A pair before what begins it.
LINE_ENDS = ("\r\n", "\r", "\x0c", "\u2028", "\u2029")
BLANK_LINES = re.compile(r"\n{4,}")
REPLACEMENT = "\ufffd"
WIDE_BLANKS = "".join(mark for mark in map(chr, range(0x3001)) if mark.isspace() and mark not in " \t\n")
WIDE_BLANK_AT_END = re.compile(rf"[{WIDE_BLANKS}](?:\n|\Z)")
# ftfy takes a hundred times as long as looking does. It gets a line that has a sign of damage (a character of another
# encoding's bytes) and something that its own heuristic can object to: a C1 control, one of four letters, or two of the
# characters that it judges side by side, unless they are letters as words have them (small ones, a capital in front).
SIGNS_OF_DAMAGE = re.compile("[\u0080-\u009f\u00c2-\u00f4\u0102-\u0192\u02c6-\u02dd\u2018-\u203a\u20ac\u2122]")
LATIN = [chr(code) for code in range(0xC0, 0x180) if chr(code) not in "×÷ŒœÎÐ"]
SMALL = "".join(filter(str.islower, LATIN)) + "\u0193-\u02af\u0391-\u03c9\u0401\u0403-\u045f"
LETTERS = "".join(filter(str.isupper, LATIN)) + SMALL
JUDGED = (
    "\u0080-\u0491\u2013-\u2044\u20a7\u20ac\u2116\u2122\u2202-\u2265\u2310\u2502\u250c\u2510\u2518\u251c\u2524\u252c\u253c"
    "\u2550-\u256c\u2580-\u2593\u25ca\uf8ff\ufb01\ufb02\ufffd"
)
SUSPICIOUS = re.compile(f"[{JUDGED}](?:(?<=[\x80-\x9fÂÃŒœ])|(?![{SMALL}])[{JUDGED}]|(?<![{LETTERS}])[{JUDGED}])")


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
        """Lines that ftfy may have to say something about are given to it, each by itself."""
        parts, place = [], 0
        found = SUSPICIOUS.search(text)
        while found:
            start, end = text.rfind("\n", 0, found.start()) + 1, text.find("\n", found.end())
            end = end if end >= 0 else len(text)
            if SIGNS_OF_DAMAGE.search(text, start, end):
                parts += [text[place:start], self._fix(text[start:end])]
                place = end
            found = SUSPICIOUS.search(text, end)
        return "".join([*parts, text[place:]])

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        text = with_plain_line_ends(draft.text)
        if self._fix is not None and not text.isascii() and SIGNS_OF_DAMAGE.search(text):
            repaired = self._repaired(text)
            counts["repaired"] += repaired != text
            text = repaired
        text, controls = without_controls(text)
        counts["controls"] += controls
        if not text.isascii():  # what is ASCII is in every form and has no character lost
            if self._form != "none" and not unicodedata.is_normalized(self._form, text):
                text = unicodedata.normalize(self._form, text)
                counts["normalised"] += 1
            if text.count(REPLACEMENT) > self._damaged_share * len(text):
                return "unreadable"
        draft.text = without_trailing_blanks(text)
        return None


def with_plain_line_ends(text: str) -> str:
    """The text with line feeds as its only line ends."""
    for end in LINE_ENDS:
        if end in text:
            text = text.replace(end, "\n")
    return text


def without_controls(text: str) -> tuple[str, int]:
    """The text without control characters, and how many they were."""
    if not text.isascii():
        return CONTROLS.subn("", text)
    content = text.encode()
    plain = content.translate(None, ASCII_CONTROLS)
    return (text, 0) if len(plain) == len(content) else (plain.decode(), len(content) - len(plain))


def without_trailing_blanks(text: str) -> str:
    """No blanks at the end of a line, no more than two blank lines together, none at the beginning and the end.

    The text has no control characters any more.
    """
    blanks = " \n" in text or "\t\n" in text or text.endswith((" ", "\t"))
    if blanks or (not text.isascii() and WIDE_BLANK_AT_END.search(text)):
        text = "\n".join(map(str.rstrip, text.split("\n")))
    if "\n\n\n\n" in text:
        text = BLANK_LINES.sub("\n\n\n", text)
    return text.strip("\n")
