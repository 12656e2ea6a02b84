"""Text that is made to be slow: what a transform or a cut does grows with its size, never with the square of it."""

import time
from collections import Counter
from collections.abc import Callable

import pytest

from data_pipeline.chunk import chunks, estimated_tokens
from data_pipeline.code.imports import imports_of
from data_pipeline.code.languages import language_of
from data_pipeline.code.parse import parse
from data_pipeline.code.signals import signals_of
from data_pipeline.extract.normalise import NormaliseSection
from data_pipeline.pii.secrets import find_secrets
from data_pipeline.transform.base import Draft

LIMIT_S = 10.0  # of processor time; the quadratic forms took minutes for texts of these sizes


def normalised(text: str) -> str:
    draft = Draft(text, None, "a.txt")
    assert NormaliseSection(kind="normalise").make().apply(draft, Counter()) is None
    return draft.text


def within(work: Callable[[], object]) -> object:
    began = time.process_time()
    found = work()
    assert time.process_time() - began < LIMIT_S
    return found


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
    assert within(lambda: [text[start:end] for start, end in find_secrets(text)]) == [key]
