"""What the kernels count is what plain Python counts: on every code point, any mixture of scripts, and real text."""

import math
import re
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.clean import repeats, tally
from data_pipeline.clean.characters import BREAK, LETTER, POINTS, SPACE, WORD, classes
from data_pipeline.clean.gopher import GopherQualitySection, GopherRepetitionSection
from data_pipeline.clean.repeats import Grams, repeated_parts
from data_pipeline.clean.tally import count_runs, count_words, utf8
from data_pipeline.environment import environment_files
from data_pipeline.native.library import kernels
from data_pipeline.transform.base import Draft
from tests.data_pipeline.clean import slow_words as slow
from tests.data_pipeline.test_hostile_text import within

# Letters, digits and marks of many kinds, joiners, everything that is white space or ends a line, bullets, ellipses.
SYMBOLS = (
    *"aZé_0٣²Ⅷßſİ文㐀䷀가ไ́ܐ𝔘𐍈😀",
    *"'’.-•…#,\"(¿。\u200b\ufeff\u200d\ue000\U000e0100\U0010ffff\ud800",
    *" \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u2028\u2029\u3000\x00",
)
PARTS = (
    *("the", "The", "TO", "of", "with", "wıth", "house", "wordofmore", "than8letters", "don't", "well-known", "3.14"),
    *("...", "…", "- ", "• ", "\n", "\n", "\n\n", "\r\n", " ", " ", " ", ". "),
)
TEXTS = st.lists(st.one_of(st.sampled_from(SYMBOLS), st.sampled_from(PARTS)), max_size=120).map("".join)
REPEATING = st.lists(st.sampled_from(PARTS), max_size=400).map("".join)
SHARES = st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0, 3.0])


def numbered(words: list[str]) -> tuple[list[int], list[int]]:
    """Each word's number in the order in which they first come, and the characters up to each."""
    numbers: dict[str, int] = {}
    listed = [numbers.setdefault(word, len(numbers)) for word in words]
    return listed, list(accumulate(map(len, words), initial=0))


def split(grams: Grams) -> tuple[list[int], list[int]]:
    return grams._arrays[0].tolist(), grams._ends.tolist()


def check(text: str, most: int) -> None:
    assert count_words(text) == slow.count_words(text)
    assert count_runs(text) == slow.count_runs(text)
    assert repeated_parts(utf8(text)) == slow.repeated_parts(text)
    words, grams = slow.WORDS.findall(text), Grams.of_text(utf8(text))
    for n in range(1, most):
        assert grams.most_frequent(n) == slow.most_frequent(words, n)
        if 2 <= n <= 4:
            assert grams.at_most(n) >= math.prod(slow.most_frequent(words, n))
        assert grams.covered_characters(n) == slow.covered_characters(words, n)
        assert grams.repeated_characters(n) == slow.repeated_characters(words, n)


def test_each_code_point_is_what_python_takes_it_for() -> None:
    for point, entry in enumerate(classes().tolist()):
        character = chr(point)
        assert bool(entry & WORD) == (character.isalnum() or character == "_"), hex(point)
        assert bool(entry & LETTER) == (character.isalnum() and not character.isdecimal()), hex(point)
        assert bool(entry & SPACE) == character.isspace() == (not character.strip()), hex(point)
        assert bool(entry & BREAK) == (len(f"{character}a".splitlines()) == 2), hex(point)


def test_words_are_cut_and_counted_alike_at_every_code_point() -> None:
    points = [chr(point) for point in range(POINTS) if not 0xD800 <= point < 0xE000]
    for start in range(0, len(points), 512):
        # Beside a letter, a joiner and marks, twice, alone, in front of a word and of an ellipsis, and at a line's end.
        text = "".join(f"{c}a{c}.{c}{c}!{c}\n{c} {c}THE\n{c}…{c}" for c in points[start : start + 512])
        assert split(Grams.of_text(utf8(text))) == numbered(slow.WORDS.findall(text))
        assert count_words(text) == slow.count_words(text)
        assert count_runs(text) == slow.count_runs(text)
        assert repeated_parts(utf8(text)) == slow.repeated_parts(text)


@settings(deadline=None, max_examples=400)
@given(TEXTS)
def test_counts_equal_plain_pythons_on_any_mixture_of_scripts(text: str) -> None:
    assert split(Grams.of_text(utf8(text))) == numbered(slow.WORDS.findall(text))
    check(text, 6)


@settings(deadline=None, max_examples=150)
@given(REPEATING)
def test_counts_equal_plain_pythons_where_much_repeats(text: str) -> None:
    check(text, 12)


@settings(deadline=None, max_examples=300)
@given(st.one_of(TEXTS, REPEATING), SHARES, SHARES, SHARES, st.integers(0, 3))
def test_verdicts_equal_plain_pythons(text: str, one: float, other: float, third: float, least: int) -> None:
    repeating = GopherRepetitionSection(kind="gopher_repetition", parts=one, characters=other, grams=third)
    shares = {"symbols": one, "bullets": other, "ellipsis_lines": third, "letters": other, "stop_words": least}
    rules = GopherQualitySection(kind="gopher_quality", least_words=least, shortest_mean=one, **shares)
    assert repeating.make().apply(Draft(text, None, "a"), Counter()) == slow.repetition(text, repeating)
    assert rules.make().apply(Draft(text, None, "a"), Counter()) == slow.quality(text, rules)


def test_counts_and_verdicts_equal_plain_pythons_on_real_text() -> None:
    files = environment_files("package_documentation")[::9] + environment_files("standard_library")[::30]
    rules = GopherRepetitionSection(kind="gopher_repetition"), GopherQualitySection(kind="gopher_quality")
    seen: Counter[str | None] = Counter()
    for file in files[:120]:
        text = Path(file.location).read_bytes().decode("utf-8", "replace")[:60_000]
        check(text, 1)
        for own, plain in zip(rules, (slow.repetition, slow.quality), strict=True):
            found = own.make().apply(Draft(text, None, "a"), Counter())
            assert found == plain(text, own), file.path  # type: ignore[operator]
            seen[found] += 1
    assert len(seen) >= 5, seen


@pytest.mark.parametrize("key", [1, 3, 0x9E3779B97F4A7C15, 2**64 - 1])
def test_the_key_changes_nothing_that_is_counted(key: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "KEY", key)
    # Beginnings of one another, which a bad key puts side by side.
    alike = " ".join("commonbeginning"[:length] + " " + "\0" * length for length in range(1, 16))
    check(alike + "\n".join(f"a{number % 700} b{number % 7}" for number in range(3000)), 3)


def many(cell: Callable[[int], str]) -> str:
    return "".join(map(cell, range(300_000)))


@pytest.mark.parametrize("cell", ["{} ", "{}\n", "{:09d} ", "a!{}!"])
def test_hundreds_of_thousands_of_different_words_and_lines_take_no_square(cell: str) -> None:
    text = utf8(many(cell.format))
    grams = within(lambda: Grams.of_text(text))
    assert len(set(split(grams)[0])) == len(set(slow.WORDS.findall(text.decode())))
    assert within(lambda: (grams.most_frequent(4)[0], grams.covered_characters(4))) == (1, 0)
    assert within(lambda: repeated_parts(text)[1].repeats) == 0


def test_a_text_of_four_gigabytes_is_refused_and_not_counted_wrongly() -> None:
    room = (tally.ctypes.c_uint32 * 4)()
    arguments = (classes().ctypes.data, 1, room, room)
    assert kernels().joy_number_words(b"", 2**32, *arguments) == -1


def test_a_stop_word_fits_into_the_number_that_stands_for_it() -> None:
    assert set(tally.STOP_WORDS) == slow.STOP_WORDS
    assert all(re.fullmatch("[a-z]{1,4}", word) for word in tally.STOP_WORDS)
