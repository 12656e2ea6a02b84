"""Normalising gives what its plain passes over every character give, and ftfy sees each line that it would change."""

import itertools
import re
import unicodedata
from collections import Counter

import ftfy
import pytest
from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.shared.corpus import environment_texts
from data_pipeline.extract.normalise import NormaliseSection
from data_pipeline.extract.survey import SUSPICION, SUSPICIOUS, UNCOMPOSED, survey
from data_pipeline.transform.base import Draft

Outcome = tuple[str | None, str, dict[str, int]]
SIGNS_OF_DAMAGE = re.compile("[\u0080-\u009f\u00c2-\u00f4\u0102-\u0192\u02c6-\u02dd\u2018-\u203a\u20ac\u2122]")


def outcome(text: str, section: NormaliseSection) -> Outcome:
    draft, counts = Draft(text, None, "a"), Counter[str]()
    return section.make().apply(draft, counts), draft.text, dict(counts)


def slow_outcome(text: str, section: NormaliseSection) -> Outcome:
    """Every pass over the whole text, and every line with a sign of damage given to ftfy."""
    original, counts = text, Counter[str]()
    text = re.sub("\r\n?|\x0c|\u2028|\u2029", "\n", text)
    if section.repair and SIGNS_OF_DAMAGE.search(text):
        lines = text.split("\n")
        repaired = "\n".join(ftfy.fix_encoding(line) if SIGNS_OF_DAMAGE.search(line) else line for line in lines)
        counts["repaired"] += repaired != text
        text = repaired
    text, counts["controls"] = re.subn("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufeff\ufff9-\ufffb]", "", text)
    form = section.form
    if form != "none" and unicodedata.normalize(form, text) != text:
        text = unicodedata.normalize(form, text)
        counts["normalised"] += 1
    if text.count("\ufffd") > section.damaged_share * len(text):
        return "unreadable", original, dict(counts)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return None, re.sub(r"\n{4,}", "\n\n\n", text).strip("\n"), dict(counts)


SETTINGS = [
    NormaliseSection(kind="normalise"),
    NormaliseSection(kind="normalise", form="NFKC", damaged_share=0.3),
    NormaliseSection(kind="normalise", form="none", repair=False, damaged_share=1),
]
JUDGED = sorted(
    {chr(c) for c in range(0x80, 0x10000) if re.match("[" + "".join(MOJIBAKE_CATEGORIES.values()) + "]", chr(c))}
)
OTHERS = sorted(
    {*"√±∂†≠®™´≤≥¥µø≈°¢‚ÄìîïòôúùûπâóàäêвЂВГРСўΒΓΞΟΆā€ØÙŸŠŒœÂÃÎÐ", *"\xa0\xad", *"aZ .,?!\"'0_", *"中。ёəĕıўç一"}
)
FRAGMENTS = (
    *("\n", "\n", "\n\n\n", "\r\n", "\r", "\x0c", "\u2028", "\u2029", "\x85", "\x0b", "\x1f", "\x00", "\x7f", "\ufeff"),
    *(" ", "\t", "\xa0", "\u3000", "\u2003", "\u200b", "a", "word ", "b.", "中文。", "“quoted”", "it’s", "été", "Čáp"),
    *(
        "schÃ¶n",
        "â€œso",
        "â€¨",
        "â€\x9d",
        "Ã\xa0 la",
        "voilÃ le",
        "ÐŸÑ€Ð¸",
        "п»ї",
        "\ufffd",
        "e\u0301",
        "\u1161",
        "ﬁ",
        "Å",
    ),
    *("┬á", "‚Äî", "Ñ", "œ.", "Â ", "ü", "\U0001f600", "\u0344"),
)


@settings(deadline=None, max_examples=1500)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join), st.sampled_from(SETTINGS))
def test_passes_that_are_skipped_would_have_changed_nothing(text: str, section: NormaliseSection) -> None:
    assert outcome(text, section) == slow_outcome(text, section)


@pytest.mark.parametrize("section", SETTINGS, ids=["default", "NFKC", "none"])
def test_real_texts_become_what_plain_passes_make_of_them(section: NormaliseSection) -> None:
    for content in environment_texts(0.3):
        assert outcome(content.decode(), section) == slow_outcome(content.decode(), section)


def test_no_two_characters_that_ftfy_objects_to_are_missed() -> None:
    assert len(JUDGED) > 400
    missed = [
        pair
        for pair in map("".join, itertools.product({*JUDGED, *OTHERS}, repeat=2))
        if not SUSPICION.search(pair) and (is_bad(f"a{pair}a") or is_bad(f" {pair} ") or is_bad(pair))
    ]
    assert not missed


@settings(deadline=None, max_examples=3000)
@given(st.text(st.sampled_from([*JUDGED, *OTHERS, *OTHERS]), max_size=12))
def test_no_longer_sequence_that_ftfy_objects_to_is_missed(text: str) -> None:
    assert SUSPICION.search(text) or not is_bad(text)


@settings(deadline=None, max_examples=1500)
@given(st.lists(st.sampled_from([*FRAGMENTS, *JUDGED, *OTHERS]), max_size=8).map("".join))
def test_the_survey_suspects_what_the_expression_finds(text: str) -> None:
    assert bool(survey(text) & SUSPICIOUS) == bool(SUSPICION.search(text))


@settings(deadline=None, max_examples=3000)
@given(
    st.text(
        st.one_of(
            st.characters(exclude_categories=["Cs"]),
            st.sampled_from("eA\u0301\u0323\u1100\u1161\u11a8\uac00か\u3099\u212b\u0344"),
        ),
        max_size=6,
    )
)
def test_what_has_nothing_uncomposed_is_in_normal_form(text: str) -> None:
    assert survey(text) & UNCOMPOSED or unicodedata.normalize("NFC", text) == text


def test_common_scripts_are_known_to_be_composed() -> None:
    assert not survey("plain “quoted” été Привет 中文。かな 한국어 ½ €") & UNCOMPOSED
