"""No document costs the square of its length: what repeats a phrase for forty thousand characters passes soon.

One page of blanks must not hold a worker for hours. Seconds of this process's CPU are bounded, eight times as many
as were measured; expressions that give back or begin anew inside a run took 4 to 9.
"""

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from data_pipeline.chunk import chunks, estimated_tokens
from data_pipeline.code.imports import imports_of
from data_pipeline.code.languages import LANGUAGES
from data_pipeline.code.licence import recognised, tagged
from data_pipeline.code.signals import signals_of
from data_pipeline.dedup.lines import SpanSettings, span_rows
from data_pipeline.readers.files import without_front_matter
from data_pipeline.score.heuristic import HeuristicScorer
from data_pipeline.tokenizer import without_long_words
from data_pipeline.transform.base import Draft, TransformSection
from data_pipeline.transform.registry import KINDS

LENGTH = 40_000
CPU_SECONDS = 3.0
# What is asked for with files is tested with them; pages have a limit of their own, in a process of their own.
ELSEWHERE = {"url_blocklist", "site_lines", "noise", "extract"}
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


def blocks() -> dict[str, TransformSection]:
    """A transform of each kind that needs no file, as it is by default."""
    return {kind: section(kind=kind) for kind, section in KINDS.items() if kind not in ELSEWHERE}  # type: ignore[call-arg]


def functions() -> dict[str, Callable[[str], object]]:
    """Everything that a document's text goes through."""

    def of_block(section: TransformSection) -> Callable[[str], object]:
        block = section.make()
        return lambda text: block.apply(Draft(text, "https://a.org/b", "a.py"), Counter())

    def of_language(suffix: str) -> Callable[[str], object]:
        return lambda text: (signals_of(text, f"a{suffix}"), imports_of("r", {f"a{suffix}": text, f"b{suffix}": ""}))

    return {
        **{kind: of_block(section) for kind, section in blocks().items()},
        **{language.name: of_language(language.suffixes[0]) for language in LANGUAGES if language.trivial},
        **{
            language.name: of_language(language.suffixes[0])
            for language in LANGUAGES
            if language.name in ("json", "toml", "xml")
        },
        "licence": lambda text: (tagged(text), recognised(text)),
        "chunk": lambda text: list(chunks(text, 4096, estimated_tokens)),
        "front matter": lambda text: without_front_matter(text.encode()),
        "spans of lines": lambda text: span_rows(0, text.encode(), SpanSettings()),
        "heuristic": lambda text: HeuristicScorer().score([text]),
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


@pytest.mark.parametrize("name", functions())
def test_time_does_not_grow_with_the_square_of_what_repeats(name: str) -> None:
    run = functions()[name]
    run("A first text loads what is loaded once.")
    around = [(before, unit, after) for unit in UNITS for before, after in AROUND]
    for before, unit, after in (*around, *MORE):
        text = before + unit * (LENGTH // len(unit)) + after
        with cpu_limit(CPU_SECONDS, f"{name} on {before!r}, {unit!r} again and again, {after!r}"):
            run(text)
