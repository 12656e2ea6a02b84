"""What is found at the places that the kernel names is what the expressions find when they look at every character."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.shared.corpus import environment_texts
from benchmarks.shared.personal_data import labelled_texts
from data_pipeline.pii import detect, secrets
from data_pipeline.pii.scan import Begin, Scan

PATTERNS: dict[Begin, re.Pattern[str]] = {
    Begin.EMAIL: detect.EMAIL,
    Begin.NUMBER: detect.DIGITS,
    Begin.IPV4: detect.IPV4,
    Begin.IPV6: detect.IPV6,
    Begin.IBAN: detect.IBAN,
    Begin.EUROPEAN: detect.EUROPEAN,
    Begin.TOKEN: secrets.PREFIXES,
    Begin.VALUE: secrets.VALUES,
}
CUT = (
    "",
    "",
    "",
    "7",
    "x",
    "_",
    "-",
    ".",
    "+",
    "/",
    "=",
    "#",
    ":",
    "(",
    ")",
    "@",
    " ",
    "\n",
    '"',
    "%",
    "?",
    "é",
    "电话",
    "\u2011",
    "\U0001f600",
)
# For each kind pieces of what it matches, put together at random with what may stand in front, between and behind.
PIECES: dict[Begin, tuple[str, ...]] = {
    Begin.EMAIL: (
        *("anna", "a.b", "_x", "%", "@", "@firma.io", "@b.", "c.org", "-d", "a" * 64, "a" * 61 + ".", "..", "é@"),
    ),
    Begin.NUMBER: (
        *("1", "12", "+49", "(415)", "555", "-", " ", "\u2010", "\u2012", "\u2013", "/", ") ", "2671", "X", "1234567"),
    ),
    Begin.IPV4: ("8.8.8.8", "1.", "10.", "255", "256.", ".", "1234.", "0", "-1"),
    Begin.IPV6: ("::", ":", "ff", "2001:", "4860", "a1b2:", "12:30:45", "12345", "g", "0:0:0:0:0:0:0:", "1"),
    Begin.IBAN: (
        *(
            "DE89",
            " 3704",
            "-0044",
            "0532",
            "GB82",
            "WEST",
            "A",
            "1",
            "Z9",
            "12",
            "de89",
            "FR1420041010050500013M02606",
        ),
    ),
    Begin.EUROPEAN: (
        *("RSSMRA", "85T10A562S", "12345678", "Z", "12.345.678", "X", "-1234567", "Y1234567", " L", "00", "A"),
        *("2 55 08", " 14 168 025 38", "1550814168025", "38", "2A", "155", "082B", "168025", "9"),
    ),
    Begin.TOKEN: (
        *("AKIAIOSFODNN7EXAMPLE", "ghp_", "gh", "github_pat_", "glpat-", "xoxb-", "rk_live_", "sk_test_", "AIza"),
        *("sk-", "hf_", "npm_", "pypi-AgEIcHlwaS5vcmc", "SG.", "eyJ", "ant-", "a1B2" * 9, "b" * 22, "c" * 43, ".", "-"),
        *("Q7" * 25,),
    ),
    Begin.VALUE: (
        *(
            ":",
            '="',
            "> '",
            "=  `",
            " ",
            "\t",
            "\u3000",
            "\xa0",
            "\x1c",
            "\u2028",
            '"',
            "'",
            "`",
            '=\u3000\xa0"',
            ":?'",
        ),
        *("x" * 12, "x" * 12 + "'", "y" * 11, "é" * 6, 'é?=1é?=1é?=1"', "z" * 200, "w" * 188, "password", "?", "="),
    ),
}


def spans(found: object) -> list[tuple[int, int]]:
    return [match.span() for match in found]  # type: ignore[attr-defined]


@st.composite
def texts(draw: st.DrawFn, begin: Begin) -> str:
    return "".join(draw(st.lists(st.sampled_from((*PIECES[begin], *PIECES[begin], *CUT)), max_size=24)))


@pytest.mark.parametrize("begin", Begin, ids=lambda begin: begin.name)
def test_no_match_of_an_expression_is_missed(begin: Begin) -> None:
    pattern = PATTERNS[begin]
    matched = 0

    @settings(deadline=None, max_examples=700)
    @given(texts(begin))
    def compare(text: str) -> None:
        nonlocal matched
        plain = spans(pattern.finditer(text))
        matched += len(plain)
        assert spans(Scan(text).matches(pattern, begin)) == plain

    compare()
    assert matched > 20


ALL = sorted({*CUT, *(piece for pieces in PIECES.values() for piece in pieces)})


@settings(deadline=None, max_examples=500)
@given(st.lists(st.sampled_from(ALL), max_size=30).map("".join))
def test_kinds_do_not_hide_one_another(text: str) -> None:
    scan = Scan(text)
    for begin, pattern in PATTERNS.items():
        assert spans(scan.matches(pattern, begin)) == spans(pattern.finditer(text))


def test_in_real_and_in_labelled_texts_no_match_is_missed() -> None:
    real = [content.decode() for content in environment_texts(0.6)]
    matched = dict.fromkeys(Begin, 0)
    for text in (*real, *(one.text for one in labelled_texts(400, seed=3))):
        scan = Scan(text)
        for begin, pattern in PATTERNS.items():
            plain = spans(pattern.finditer(text))
            assert spans(scan.matches(pattern, begin)) == plain
            matched[begin] += len(plain)
    assert min(matched.values()) > 10, matched


def test_prose_names_no_place_at_all() -> None:
    text = "The quick brown fox, 12 years old: it jumps (twice) over 3 lazy dogs = 4 + 5. " * 200
    assert not any(list(Scan(text).matches(re.compile(""), begin)) for begin in Begin)
