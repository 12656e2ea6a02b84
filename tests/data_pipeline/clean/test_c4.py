"""C4's rules give what a plain reading of them gives, line by line, whatever the text and the settings are."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.shared.corpus import environment_texts
from data_pipeline.clean.c4 import C4Section
from data_pipeline.clean.words import count_sentences
from data_pipeline.transform.base import Draft

Outcome = tuple[str | None, str, dict[str, int]]


def outcome(text: str, section: C4Section) -> Outcome:
    draft, counts = Draft(text, None, "a"), Counter[str]()
    return section.make().apply(draft, counts), draft.text, dict(counts)


def line_reason(raw: str, line: str, section: C4Section) -> str | None:
    lower = line.lower()
    if max(map(len, raw.split()), default=0) > 1000:
        return "long_word"
    if section.terminal and not re.search(r"""(?<!\.\.)\.\Z|[?!"']\Z""", line):
        return "no_end"
    if len(raw.split()) < section.words:
        return "few_words"
    if "lorem ipsum" in lower:
        return "lorem_ipsum"
    if "javascript" in lower:
        return "javascript"
    if section.brackets and "{" in lower:
        return "curly_bracket"
    policy = r"(terms of use|(privacy|cookie) policy|(uses|use of|use) cookies)"
    return "policy" if re.search(policy, lower) else None


def slow_outcome(text: str, section: C4Section) -> Outcome:
    """The paper's rules with every sentence of every line counted."""
    counts, kept = Counter[str](), []
    for raw in text.splitlines():
        line = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", raw.strip())
        reason = line_reason(raw, line, section)
        if reason in ("lorem_ipsum", "curly_bracket"):
            return reason, text, dict(counts)
        if reason is None:
            kept.append(line)
        else:
            counts[f"lines_{reason}"] += 1
    if sum(map(count_sentences, kept)) < section.sentences:
        return "few_sentences", text, dict(counts)
    return None, "\n".join(kept).strip(), dict(counts)


SETTINGS = [
    C4Section(kind="c4", sentences=sentences, words=words, terminal=terminal, brackets=brackets)
    for sentences, words, terminal, brackets in (
        *((5, 3, True, True), (0, 3, True, True), (1, 0, False, True), (3, 1, False, False), (9, 2, True, False)),
    )
]
FRAGMENTS = (
    *(
        "One two three.",
        "He left. Why? Nobody knows!",
        "Dr. Smith came at 3 p.m. (He left.) ",
        "so on ...",
        "a",
        " ",
        "  ",
    ),
    *(
        "\n",
        "\n",
        "\n",
        "\r\n",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x1f",
        "\x85",
        "\u2028",
        "\xa0",
        "\u3000",
        "\u2003",
        "\u1680",
        "\u2029",
        "\u205f",
        "\ufeff",
    ),
    *("[12]", "[]", "[edit]", "[citation needed]", "[١]", "[", "]", "{", ".", "...", '"', "'", "?", "…", "。"),
    *(
        "Lorem ipsum",
        "java[1]script",
        "JavaScript is",
        "We use cookies",
        "coo\u212aie policy",
        "cookİe",
        "TERMS OF USE",
    ),
    *("x" * 998, "中" * 500, "x" * 4, "中文句子。", "ſ", "İ"),
)


@settings(deadline=None, max_examples=1500)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join), st.sampled_from(SETTINGS))
def test_lines_go_for_the_reasons_that_a_plain_reading_gives(text: str, section: C4Section) -> None:
    assert outcome(text, section) == slow_outcome(text, section)


@pytest.mark.parametrize("section", SETTINGS, ids=str)
def test_real_texts_are_judged_as_a_plain_reading_judges_them(section: C4Section) -> None:
    for content in environment_texts(0.4):
        assert outcome(content.decode(), section) == slow_outcome(content.decode(), section)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(FRAGMENTS[:8]), max_size=12).map("".join), st.integers(0, 6))
def test_counting_no_further_than_asked_counts_the_same_so_far(text: str, most: int) -> None:
    assert count_sentences(text, most) == min(most, count_sentences(text))
