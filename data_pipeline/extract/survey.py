"""What a text has that normalising can change, found in one look: passes that would change nothing are not made."""

import re
import unicodedata
from functools import cache

import numpy as np
import numpy.typing as npt

from data_pipeline.native.library import kernels

# Bits of what a text has, as native/survey.c numbers the first eight. TRAILING: blanks at a line's end; BLANK_LINES:
# more than two together; UNCOMPOSED: a character that NFC may change, alone or with what stands in front of it.
BLANK, TRAILING, BLANK_LINES, UNCOMPOSED, SUSPICIOUS, ODD, CAPITAL, SMALL = (1 << bit for bit in range(8))
LINE_END, CONTROL, DAMAGE = (1 << bit for bit in range(8, 11))

# What ftfy's own heuristic can object to: one of a few characters, or two side by side of those that it judges, unless
# they are letters as words have them: small ones, a capital in front.
JUDGED = (
    "\u0080-\u0491\u2013-\u2044\u20a7\u20ac\u2116\u2122\u2202-\u2265\u2310\u2502\u250c\u2510\u2518\u251c\u2524\u252c\u253c"
    "\u2550-\u256c\u2580-\u2593\u25ca\uf8ff\ufb01\ufb02\ufffd"
)
ALONE = "\x80-\x9fÂÃŒœ"
LATIN = [chr(code) for code in range(0xC0, 0x180) if chr(code) not in "×÷ŒœÎÐ"]
CAPITALS = "".join(filter(str.isupper, LATIN))
SMALLS = "".join(filter(str.islower, LATIN)) + "\u0193-\u02af\u0391-\u03c9\u0401\u0403-\u045f"
SUSPICION = re.compile(f"[{JUDGED}](?:(?<=[{ALONE}])|(?![{SMALLS}])[{JUDGED}]|(?<![{CAPITALS}{SMALLS}])[{JUDGED}])")
SETS = {
    BLANK: r"[^\S\n]",
    SUSPICIOUS: f"[{ALONE}]",
    ODD: f"(?![{CAPITALS}{SMALLS}])[{JUDGED}]",
    CAPITAL: f"[{CAPITALS}]",
    SMALL: f"(?=[{JUDGED}])[{SMALLS}]",
    LINE_END: "[\r\x0c\u2028\u2029]",
    CONTROL: "[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufeff\ufff9-\ufffb]",
    # Characters that text decoded as the wrong encoding has: one of these is in all that is repaired.
    DAMAGE: "[\u0080-\u009f\u00c2-\u00f4\u0102-\u0192\u02c6-\u02dd\u2018-\u203a\u20ac\u2122]",
}
POINTS = 0x10000  # characters above count as uncomposed
JAMO = range(0x1100, 0x1200)  # letters of Hangul, which compose by rule and not by table


@cache
def classes() -> npt.NDArray[np.uint16]:
    """uint16 [POINTS], of each character the bits of what it is; some hundredths of a second, once for each process."""
    every = "".join(map(chr, range(POINTS)))
    table = np.zeros(POINTS, dtype=np.uint16)
    for bit, pattern in SETS.items():
        table[[found.start() for found in re.finditer(pattern, every)]] |= np.uint16(bit)
    pairs = [unicodedata.decomposition(mark).split() for mark in every]
    second = {int(pair[1], 16) for pair in pairs if len(pair) == 2 and not pair[0].startswith("<")}
    stable = [
        not unicodedata.combining(mark) and point not in second and unicodedata.is_normalized("NFC", mark)
        for point, mark in enumerate(every)
    ]
    table[~np.array(stable)] |= np.uint16(UNCOMPOSED)
    table[list(JAMO)] |= np.uint16(UNCOMPOSED)
    return table


@cache
def _address() -> int:
    return classes().ctypes.data


def survey(text: str) -> int:
    """The bits of what a text has."""
    content = text.encode()
    return int(kernels().joy_survey(content, len(content), _address()))
