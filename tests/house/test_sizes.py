"""No file over 500 lines, no function over 60: a test holds it, so that no review has to."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_joy", "data_pipeline", "launch", "benchmarks", "tests", "tools", "slurm")
SUFFIXES = {".py", ".sh", ".js", ".css", ".html"}
LONGEST_FILE = 500
LONGEST_FUNCTION = 60

FILES = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in SUFFIXES and "__pycache__" not in path.parts
)


def test_there_is_something_to_measure() -> None:
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    lines = text.count("\n")
    assert lines <= LONGEST_FILE, f"{path} has {lines} lines"
    if path.suffix != ".py":
        return
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    }
    assert not long, f"{path} has functions over {LONGEST_FUNCTION} lines: {long}"
