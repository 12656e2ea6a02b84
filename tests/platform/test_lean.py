"""What a CPU has no use for is not imported with Megatron-core, and everything else is as it was."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from megatron_joy.platform import lean
from tests.gloo import run_world

COMPILER = ("torch._inductor.compile_fx", "torch._dynamo.debug_utils")


def source_of(module: str) -> bytes:
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None
    return Path(found.origin).read_bytes()


def imported(names: tuple[str, ...]) -> list[str]:
    """In a rank, which has built nothing yet: those of some modules that it was started with."""
    return [name for name in names if name in sys.modules]


@pytest.mark.parametrize("module", lean.COMPILED)
def test_megatron_core_still_compiles_what_is_left_as_written(module: str) -> None:
    assert lean.compiled_functions(source_of(module)) == list(lean.COMPILED[module])


@pytest.mark.parametrize("module", lean.OPTIONAL)
def test_a_package_that_is_kept_away_is_still_asked_for(module: str) -> None:
    asked = [node for node in ast.walk(ast.parse(source_of(module))) if isinstance(node, ast.Import)]
    assert lean.OPTIONAL[module] in {alias.name for node in asked for alias in node.names}


def test_a_rank_starts_without_compiler_and_optional_packages() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: nothing is left out")
    kept_away = (*COMPILER, *lean.OPTIONAL.values())
    (there,) = run_world(imported, 1, (*kept_away, "megatron.core.transformer.moe.router"))
    assert there == ["megatron.core.transformer.moe.router"]


def test_a_function_left_as_written_is_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        b"import torch\n@torch.compile\ndef half(x):\n    return x / 2\n"
        b"class Box:\n    @staticmethod\n    @torch.compile\n    def twice(x):\n        return x * 2\n"
    )
    monkeypatch.setattr(torch, "compile", None)  # calling it would fail
    seen: dict[str, object] = {}
    exec(compile(lean.undecorated(source), "box.py", "exec"), seen)
    half, box = seen["half"], seen["Box"]
    assert half(3.0) == 1.5  # type: ignore[operator]
    assert box.twice(3.0) == 6.0  # type: ignore[attr-defined]
    assert half.__code__.co_firstlineno == 3  # type: ignore[attr-defined]  # tracebacks point where they should


def test_a_package_is_kept_away_from_one_import_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with lean.without("colorsys"), pytest.raises(ImportError):
        importlib.import_module("colorsys")
    there = importlib.import_module("colorsys")
    with lean.without("colorsys"):  # whoever has it keeps it
        assert importlib.import_module("colorsys") is there
