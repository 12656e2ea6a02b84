"""A file's signals are the counts that one makes by hand, and the rules act on them and on nothing else."""

import dataclasses
from pathlib import Path

import pytest

from data_pipeline.code.block import CodeSection
from data_pipeline.code.languages import is_test, language_of
from data_pipeline.code.parse import Parsed, parse
from data_pipeline.code.signals import Bounds, Signals, signals_of, verdict
from data_pipeline.transform.base import Draft
from data_pipeline.transform.chain import Chain

SAMPLE = """\
# SPDX-License-Identifier: MIT
import os

TABLE = [
    1, 2, 3,
    0xdeadbeef, 5,
]


def one():
    pass


def two():
    pass  # see https://example.org/x
"""


def test_signals_are_what_one_counts_by_hand() -> None:
    found = signals_of(SAMPLE, "a/b.py")
    assert (found.characters, found.lines) == (len(SAMPLE), 15)
    assert found.longest_line == len("    pass  # see https://example.org/x")
    assert found.mean_line == pytest.approx(sum(map(len, SAMPLE.splitlines())) / 15)
    written = [line for line in SAMPLE.splitlines() if line.strip()]
    assert len(written) == 10
    assert found.comments == 1 / 10  # the first line; a comment behind code is code
    assert found.data == 2 / 10  # the two lines of numbers; a bracket alone holds no literal
    assert found.trivial == 2 / 10  # import, pass; the pass with a comment behind it says something
    assert found.functions_per_line == 2 / 10
    assert found.hex_like == pytest.approx(len("0xdeadbeef") / len(SAMPLE))
    assert found.links == pytest.approx(len("https://example.org/x") / len(SAMPLE))
    assert found.alphabetic == pytest.approx(sum(c.isalpha() for c in SAMPLE) / len(SAMPLE))
    assert found.digits == pytest.approx(sum(c.isdigit() for c in SAMPLE) / len(SAMPLE))
    assert found.white_space == pytest.approx(sum(c.isspace() for c in SAMPLE) / len(SAMPLE))
    assert found.parses is True and not found.generated and not found.test
    assert found.duplicate_lines == 0.0 and found.duplicate_ngrams == 0.0 and found.encoded == 0.0


def test_repetition_is_the_share_that_stands_earlier() -> None:
    assert signals_of("a = 1\n" * 4 + "b = 2\n", "x.py").duplicate_lines == pytest.approx(3 / 5)
    words = [f"w{i}" for i in range(20)]
    # 31 runs of ten words; those that begin in the second copy and end in it stand earlier: 11.
    assert signals_of(" ".join([*words, *words]), "x.txt").duplicate_ngrams == pytest.approx(11 / 31)


def test_block_comments_are_counted_to_their_end() -> None:
    text = "/* one\n * two\n */\nint a; /* not alone */\n// three\n#define A 1\n"
    found = signals_of(text, "x.c")
    assert (found.comments, found.preprocessor) == (4 / 6, 1 / 6)


@pytest.mark.parametrize(
    ("path", "good", "bad", "functions"),
    [
        ("a.py", "async def f(x):\n    return lambda: x\n", "def f(:\n", 1),
        ("a.json", '{"a": [1]}', '{"a": [1}', None),
        ("a.toml", "a = 1\n", "a = \n", None),
        ("a.xml", "<a><b/></a>", "<a><b></a>", None),
        ("a.c", "int f(void) { return 1; }\n", "int f(void) { return 1; )\n", 1),
        ("a.cpp", "struct A { int f() { return 1; } };\n", "struct A { int f() { return 1; ;;((\n", 1),
        ("a.java", "class A { A() {} int f() { return 1; } }\n", "class A { int f( { return 1; }\n", 2),
        ("a.js", "function f() { return () => 1 }\n", "function f( { return\n", 2),
        ("a.ts", "const f = (x: number): number => x;\n", "const f = (x: number : => ;\n", 1),
        ("a.go", "package a\nfunc F() int { return 1 }\n", "package a\nfunc F( int { return\n", 1),
        ("a.rs", "fn f() -> u8 { 1 }\n", "fn f( -> u8 { 1\n", 1),
    ],
)
def test_every_parser_tells_sound_from_broken(path: str, good: str, bad: str, functions: int | None) -> None:
    language = language_of(path)
    found = parse(good, language)
    assert (found.parses, found.functions) == (True, functions)
    assert parse(bad, language).parses is False


def test_a_header_in_cpp_is_not_broken_c() -> None:
    assert parse("namespace a { template <class T> struct B { T t; }; }\n", language_of("a.h")).parses is True


def test_a_line_that_no_person_wrote_is_not_parsed() -> None:
    assert parse("x = [" + "1, " * 10_000 + "]\n", language_of("a.py")) == Parsed(None, None)
    assert parse("x = [\n" + "1,\n" * 10_000 + "]\n", language_of("a.py")) == Parsed(True, 0)


def test_what_no_parser_knows_is_not_known() -> None:
    assert parse("-- anything", language_of("a.lua")).parses is None
    assert parse("anything", language_of("a.unheard_of")).parses is None


@pytest.mark.parametrize(
    ("path", "test"),
    [
        ("pkg/test_a.py", True),
        ("pkg/conftest.py", True),
        ("tests/helper.py", True),
        ("pkg/latest.py", False),
        ("contest/a.py", False),
        ("a/foo_test.go", True),
        ("src/FooTest.java", True),
        ("src/a.spec.ts", True),
        ("src/a.ts", False),
    ],
)
def test_test_files_are_told_by_their_path(path: str, test: bool) -> None:
    assert is_test(path, language_of(path)) is test


ALPHABETS = " ".join("abcdefghijklmnopqrstuvwxyz" * 2)[:99]
CASES: list[tuple[str, str, str]] = [
    ("generated", "x.py", "# Generated by protoc. DO NOT EDIT\nx = 1\n"),
    ("test", "tests/x.py", "x = compute(first, second)\n"),
    ("syntax", "x.py", "def f(:\n    return\n"),
    ("alphabetic", "x.txt", "1234567890 " * 9),
    ("longest_line", "x.py", "x = '" + "ab cd " * 200 + "'\n"),
    ("mean_line", "x.py", ("x = call(" + ", ".join(f"argument_{i}" for i in range(12)) + ")\n") * 2),
    ("hex_like", "x.txt", "value deadbeefdeadbeefdeadbeef\ncafebabecafebabe\n"),
    ("encoded", "x.txt", "key\none\ntwo\nthree\n" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldY" * 8 + "\n"),
    ("duplicate_lines", "x.py", "value = other\n" * 9),
    (
        "duplicate_ngrams",
        "x.txt",
        "".join(f"{i}\n{ALPHABETS}\n" for i in range(9)),
    ),
    ("data", "x.txt", "\n".join(f"'{chr(97 + i % 6)}{i}', \"abcdef\"" for i in range(30))),
    ("trivial", "x.py", "import a\nimport b\nprint(a)\nb = a(1)\n"),
    ("preprocessor", "x.c", "#define ONE first\n#define TWO second\nint main(void);\n"),
]


@pytest.mark.parametrize(("reason", "path", "text"), CASES, ids=[case[0] for case in CASES])
def test_each_rule_drops_what_it_is_for_and_is_silent_when_its_bound_is_loosened(
    reason: str, path: str, text: str
) -> None:
    strict = Bounds(tests=True, trivial=0.5, preprocessor=0.5)
    assert verdict(signals_of(text, path), strict) == reason
    loose = {
        "generated": {"generated": False},
        "test": {"tests": False},
        "syntax": {"must_parse": False},
        "alphabetic": {"least_alphabetic": 0.0},
        "longest_line": {"longest_line": 10**6, "mean_line": 10.0**6},
        "mean_line": {"mean_line": 1000.0},
    }.get(reason, {reason: 1.0})
    assert verdict(signals_of(text, path), dataclasses.replace(strict, **loose)) != reason


def test_own_sources_stay() -> None:
    import data_pipeline.code.signals as module

    text = Path(str(module.__file__)).read_text()
    assert verdict(signals_of(text, "data_pipeline/code/signals.py"), Bounds()) is None


def test_signals_of_nothing_are_zeros() -> None:
    found = signals_of("", "x.py")
    assert all(value in (0, 0.0, False, True, None) for value in dataclasses.astuple(found))
    assert isinstance(found, Signals)


def test_the_licence_gate_closes_the_accounts() -> None:
    chain = Chain([CodeSection.model_validate({"kind": "code", "licences": ["permissive"]})])
    allowed = Draft("# SPDX-License-Identifier: GPL-2.0-only OR MIT\nx = f(y)\n", None, "a.py")
    stated = Draft("x = f(y)\n", None, "a.py", licence="Apache-2.0")
    unknown = Draft("x = f(y)\n", None, "a.py")
    foreign = Draft("// SPDX-License-Identifier: GPL-3.0-or-later\nint a;\n", None, "a.c", licence="MIT")
    gone = [chain.apply(draft) for draft in (allowed, stated, unknown, foreign)]
    assert [found.reason if found else None for found in gone] == [None, None, "code.licence", "code.licence"]
    assert allowed.licence == "GPL-2.0-only OR MIT"  # what the file says goes on with it
    (account,) = chain.accounts
    assert (account.documents_in, account.documents_out, account.dropped) == (4, 2, {"licence": 2})
    assert account.counts == {"python": 3, "c": 1}
