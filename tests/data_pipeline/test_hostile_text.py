"""Text that is made to be slow: what a transform, a parser or a cut does grows with its size, never with its square.

One page of blanks must not hold a worker for hours. Seconds of this process's CPU are bounded, for what repeats a
phrase to eight times as many as were measured; expressions that give back or begin anew inside a run took 4 to 9,
and minutes for the large texts.
"""

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import numpy as np
import pytest

from data_pipeline.chunk import chunks, estimated_tokens
from data_pipeline.clean.noise import line_chances
from data_pipeline.code.imports import imports_of
from data_pipeline.code.languages import LANGUAGES, language_named, language_of
from data_pipeline.code.licence import recognised, tagged
from data_pipeline.code.parse import Parsed, parse
from data_pipeline.code.signals import signals_of
from data_pipeline.dedup.lines import SpanSettings, span_rows
from data_pipeline.extract.normalise import NormaliseSection
from data_pipeline.pii.scan import Scan
from data_pipeline.pii.secrets import find_secrets
from data_pipeline.readers.files import without_front_matter
from data_pipeline.score.heuristic import HeuristicScorer
from data_pipeline.score.linear import LinearScorer
from data_pipeline.tokenizer import without_long_words
from data_pipeline.transform.base import Draft
from data_pipeline.transform.registry import KINDS

LENGTH, CPU_SECONDS = 40_000, 3.0
CPU_SECONDS_OF_LARGE = 10.0
UNITS = (
    *(
        " ",
        "\t",
        "\u3000",
        "\n",
        " \n",
        "\r\n",
        "0",
        "a",
        "-",
        ".",
        '." ',
        "a. ",
        "1,",
        "0x1 ",
        "ab1",
        "'",
        '"',
        "(",
        "[",
        "{",
    ),
    *(
        "<a ",
        "a@",
        "a.",
        "+1 ",
        "1-",
        "AB12 ",
        "ff:",
        '="',
        "key: '",
        "eyJ",
        "-----BEGIN PRIVATE KEY-----",
        "Ã",
        "中",
        "。”",
        "a'b",
    ),
    *(
        "from a import (\n",
        "from .",
        "import a,",
        "import (",
        'require("./',
        '"a/',
        "use crate::",
        "::a",
        "mod a",
        "#include <",
    ),
    *("---\n", "+++\n", "SPDX-License-Identifier: (", "MIT OR ", "print(", "/*", "# ", "https://", "</a"),
)
AROUND = (("", ""), ("a", "x"))
MORE = (
    *(
        ("from ", " ", " import"),
        ("from ", "a.", ""),
        ("use self", "::a", ";"),
        ('import "', "a/", '"'),
        ("from ", ".", " x"),
    ),
    *(
        ("", line + "\n", "")
        for line in ("key: '", "#include <", "a.", "{", "((", "'", "<a", "pub(", "a = {", "/*", '"""')
    ),
)
# Kinds that are asked for with files are tested with them; pages have a limit of their own, in a process of their own.
BLOCKS = sorted(set(KINDS) - {"url_blocklist", "site_lines", "noise", "extract"})
PARSED = sorted(language.name for language in LANGUAGES if language.trivial or language.name in ("json", "toml", "xml"))
LINEAR = LinearScorer("any", np.ones(1 << 16, dtype=np.float32), 0.0)
OTHERS: dict[str, Callable[[str], object]] = {
    "licence": lambda text: (tagged(text), recognised(text)),
    "chunk": lambda text: list(chunks(text, 4096, estimated_tokens)),
    "front matter": lambda text: without_front_matter(text.encode()),
    "spans of lines": lambda text: span_rows(0, text.encode(), SpanSettings()),
    "heuristic": lambda text: HeuristicScorer().score([text]),
    "linear": lambda text: LINEAR.score([text]),
    "noise": lambda text: line_chances(LINEAR, text),
    "long words": lambda text: list(without_long_words([text])),
}


@contextmanager
def cpu_limit(seconds: float, what: str) -> Iterator[None]:
    """Fails when this process computes for longer; waiting does not count."""

    def over(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"{what}: more than {seconds:g} seconds of CPU")

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def of_block(kind: str) -> Callable[[str], object]:
    """A transform as it is by default."""
    block = KINDS[kind](kind=kind).make()  # type: ignore[call-arg]
    return lambda text: block.apply(Draft(text, "https://a.org/b", "a.py"), Counter())


def of_language(name: str) -> Callable[[str], object]:
    """What is asked of a source file: signals with a parse, and imports."""
    language = language_named(name)
    assert language is not None
    path, other = (f"{stem}{language.suffixes[0]}" for stem in "ab")
    return lambda text: (signals_of(text, path), imports_of("r", {path: text, other: ""}))


def repeat_everything(name: str, run: Callable[[str], object]) -> None:
    run("A first text loads what is loaded once.")
    around = [(before, unit, after) for unit in UNITS for before, after in AROUND]
    for before, unit, after in (*around, *MORE):
        text = before + unit * (LENGTH // len(unit)) + after
        with cpu_limit(CPU_SECONDS, f"{name} on {before!r}, {unit!r} again and again, {after!r}"):
            run(text)


@pytest.mark.parametrize("kind", BLOCKS)
def test_no_transform_takes_the_square_of_what_repeats(kind: str) -> None:
    repeat_everything(kind, of_block(kind))


@pytest.mark.parametrize("name", PARSED)
def test_no_language_takes_the_square_of_what_repeats(name: str) -> None:
    repeat_everything(name, of_language(name))


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_takes_the_square_of_what_repeats(name: str) -> None:
    repeat_everything(name, OTHERS[name])


def test_the_limit_itself_ends_what_takes_too_long() -> None:
    def forever() -> None:
        while True:
            pass

    with pytest.raises(pytest.fail.Exception, match=r"a loop: more than 0\.1 seconds"), cpu_limit(0.1, "a loop"):
        forever()


def normalised(text: str) -> str:
    draft = Draft(text, None, "a.txt")
    assert NormaliseSection(kind="normalise").make().apply(draft, Counter()) is None
    return draft.text


def within[Found](work: Callable[[], Found]) -> Found:
    with cpu_limit(CPU_SECONDS_OF_LARGE, "a text of hundreds of kilobytes"):
        return work()


def test_blanks_within_a_line_are_no_trailing_blanks() -> None:
    gap = " \t" * 500_000
    assert within(lambda: normalised(f"a{gap}b{gap}\nc \u3000\n\n")) == f"a{gap}b\nc"


def test_a_line_of_digits_is_data_and_one_with_a_word_is_none() -> None:
    digits = "1" * 500_000
    found = within(
        lambda: [signals_of(text, "a.txt").data for text in (digits, digits + " z", '1, 0xff\n[]\n"a"\nxyz')]
    )
    assert found == [1.0, 0.0, 0.5]


def test_lists_of_imports_that_never_end_are_looked_at_once() -> None:
    text = "from a import (\n" * 30_000 + "from b import (  # (one)\n    c,  # two)\n    d,\n)\n"
    files = {"x.py": text, "a.py": "", "b/__init__.py": "", "b/c.py": "", "b/d.py": ""}
    found = within(lambda: imports_of("r", files)["x.py"])
    assert found == {"a.py", "b/__init__.py", "b/c.py", "b/d.py"}


@pytest.mark.parametrize(("unit", "path"), [("a:'", "a.c"), ("<!--", "a.c"), ("<!--", "a.go"), ("a:'", "a.js")])
def test_a_grammar_that_finds_no_way_gives_up(unit: str, path: str) -> None:
    pytest.importorskip("tree_sitter")
    # A line above 20,000 characters would not be parsed at all.
    assert within(lambda: parse((unit * 2000 + "\n") * 10, language_of(path)).parses) is False


def test_a_file_that_takes_a_parser_ever_longer_is_given_up_and_the_next_one_is_parsed() -> None:
    pytest.importorskip("tree_sitter")
    script = language_of("a.js")
    assert parse("key: '" * 3000, script) == Parsed(False, None)
    assert parse("function f() { return 0; }\n" * 2000, script) == Parsed(True, 2000)


def test_a_grammar_is_as_good_after_it_gave_up() -> None:
    pytest.importorskip("tree_sitter")
    text = "int one(void) { return 1; }\n" * 3000
    assert parse(text, language_of("a.c")) == parse(text, language_of("a.c"))
    parse(("<!--" * 2000 + "\n") * 10, language_of("a.c"))
    found = parse(text, language_of("a.c"))
    assert (found.parses, found.functions) == (True, 3000)


@pytest.mark.parametrize("unit", ["x", "x ", "文", "x\n"])
def test_a_text_without_sentences_is_cut_in_a_while(unit: str) -> None:
    text = unit * (2_000_000 // len(unit))
    parts = within(lambda: list(chunks(text, 4096, estimated_tokens)))
    assert isinstance(parts, list)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert max(map(len, parts)) <= 4 * 1.25 * 4096


def test_beginnings_of_keys_without_an_end_are_looked_at_once() -> None:
    key = "-----BEGIN PRIVATE KEY-----" + "Ab1/" * 20 + "-----END PRIVATE KEY-----"
    text = "-----BEGIN PRIVATE KEY-----\n" * 50_000 + key
    assert within(lambda: [text[start:end] for start, end in find_secrets(Scan(text))]) == [key]
