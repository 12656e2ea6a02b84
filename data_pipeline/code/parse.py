"""Whether a file parses, and how many functions it defines: the standard library's parsers, or tree-sitter's grammars.

A grammar is used where its package is installed; where none is, the answer is "not known", never a guess.
"""

import ast
import importlib
import itertools
import json
import tomllib
import warnings
import xml.parsers.expat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from data_pipeline.code.languages import Language, language_named

BLOCK = 1 << 16  # bytes that a grammar is given at a time
LARGEST = 1_000_000  # characters of a file that is parsed at all: parsers are not made for larger ones
LONGEST_LINE = 20_000  # characters; parsers take the square of some lines' length, and such a line is data
# How often a grammar may ask whether it is to go on: about every hundred steps. Of 1,651 sound and broken files none
# needed more than 0.022 of it for a byte; made ones take minutes, and the clock would not give the same answer again.
LEAST_ROOM, ROOM_PER_BYTE = 1000, 0.1
# How often it may ask for a block: a comment that never ends is read to the file's end from each of its beginnings.
LEAST_READS, READS_PER_BLOCK = 1000, 100
# Share of a file's bytes that a grammar may not understand: it doesn't expand macros, so sound C++ is never all clear.
MISUNDERSTOOD = 0.05


@dataclass(frozen=True)
class Parsed:
    """parses: None where nothing can tell; functions: how many are defined, None likewise."""

    parses: bool | None
    functions: int | None


UNKNOWN = Parsed(None, None)


def _python(text: str, language: Language) -> Parsed:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the file's own escapes
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Parsed(False, None)
    return Parsed(True, sum(type(node).__name__ in language.functions for node in ast.walk(tree)))


def _expat(text: str) -> None:
    # Without a handler for them, expat leaves external entities alone; internal ones it bounds itself.
    xml.parsers.expat.ParserCreate().Parse(text.encode(), True)


_BY_LIBRARY: dict[str, Callable[[str], Any]] = {"json": json.loads, "toml": tomllib.loads, "xml": _expat}
_LIBRARY_ERRORS = (ValueError, RecursionError, xml.parsers.expat.ExpatError)


@cache
def _grammar(package: str, function: str) -> Any | None:
    """A tree-sitter parser, None where its package is not installed."""
    try:
        tree_sitter = importlib.import_module("tree_sitter")
        made = getattr(importlib.import_module(package), function)()
    except ImportError:
        return None
    return tree_sitter.Parser(tree_sitter.Language(made))


def _tree_sitter(text: str, language: Language) -> Parsed:
    assert language.grammar is not None
    parser = _grammar(*language.grammar)
    if parser is None:
        return UNKNOWN
    content, asked, reads = text.encode(), itertools.count(), itertools.count()
    room = LEAST_ROOM + ROOM_PER_BYTE * len(content)
    most_reads = LEAST_READS + READS_PER_BLOCK * (len(content) // BLOCK)

    def read(place: int, point: object) -> bytes:
        return content[place : place + BLOCK] if next(reads) < most_reads else b""

    try:
        tree = parser.parse(read, progress_callback=lambda place, wrong: next(asked) > room)
    except ValueError:  # it was told to stop
        parser.reset()
        return Parsed(False, None)
    if next(reads) >= most_reads:
        return Parsed(False, None)
    root = tree.root_node
    functions, wrong, waiting = 0, 0, [root]
    while waiting:
        node = waiting.pop()
        functions += node.type in language.functions
        if node.is_error or node.is_missing:
            wrong += max(1, node.end_byte - node.start_byte)
        else:
            waiting += node.children
    return Parsed(wrong <= MISUNDERSTOOD * (root.end_byte - root.start_byte), functions)


def parse(text: str, language: Language | None) -> Parsed:
    """What the language's parser says of a file. Nothing of it is run."""
    if language is None or len(text) > LARGEST or max(map(len, text.splitlines()), default=0) > LONGEST_LINE:
        return UNKNOWN
    if language.name == "python":
        return _python(text, language)
    if language.name in _BY_LIBRARY:
        try:
            _BY_LIBRARY[language.name](text)
        except _LIBRARY_ERRORS:
            return Parsed(False, None)
        return Parsed(True, None)
    found = _tree_sitter(text, language) if language.grammar else UNKNOWN
    if found.parses is False and language.dialect:
        return parse(text, language_named(language.dialect))
    return found
