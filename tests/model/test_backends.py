"""Which backend a recipe gets, and that Transformer Engine's has the blocks that Megatron-core ships for it."""

import ast
import importlib
import sys
import types
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_joy.errors import UserError
from megatron_joy.model.backends import portable, select
from megatron_joy.model.backends.blocks import Blocks


def test_without_a_gpu_auto_is_portable() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert select.select_blocks("auto") is portable.BLOCKS
    assert select.select_blocks("portable") is portable.BLOCKS


def test_asking_for_transformer_engine_without_a_gpu_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match=r"model\.backend: 'te' .* no GPU is visible; use 'auto' or 'portable'"
    ) as error:
        select.select_blocks("te")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("broken", [ModuleNotFoundError("no"), FileNotFoundError("libtransformer"), RuntimeError("x")])
def test_a_broken_transformer_engine_is_passed_over_or_named(
    monkeypatch: pytest.MonkeyPatch, broken: Exception
) -> None:
    real = importlib.import_module

    def fail(name: str, package: str | None = None) -> types.ModuleType:
        if name.startswith("transformer_engine"):
            raise broken
        return real(name, package)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib, "import_module", fail)
    assert select.select_blocks("auto") is portable.BLOCKS
    with pytest.raises(UserError, match=f"importing transformer_engine.pytorch failed: {type(broken).__name__}"):
        select.select_blocks("te")


def test_a_working_transformer_engine_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    working = types.SimpleNamespace(get_cudnn_version=lambda: (9, 19, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    engine = replace(portable.BLOCKS, name="te", core_attention="its own", norm="its own")
    ours = types.SimpleNamespace(BLOCKS=engine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", working)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "megatron_joy.model.backends.te", ours)  # type: ignore[arg-type]
    assert select.select_blocks("auto") is ours.BLOCKS
    assert select.select_blocks("te") is ours.BLOCKS
    assert select.select_blocks("portable") is portable.BLOCKS
    # Its attention would want documents padded under context parallelism; the rest is its own there too.
    assert select.select_blocks("auto", 2) == replace(engine, core_attention=portable.BLOCKS.core_attention)


def test_the_blocks_for_transformer_engine_exist_in_megatron_core_without_it() -> None:
    source = Path(select.__file__).with_name("te.py").read_text()
    imported = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.core")
        for alias in node.names
    ]
    assert len(imported) >= 9
    for module, name in imported:
        spec = find_spec(module or "")
        assert spec is not None and spec.origin is not None, module
        tree = ast.parse(Path(spec.origin).read_text())
        classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        assert name in classes, f"Megatron-core's {module} has no class {name}"


def test_both_backends_fill_every_block() -> None:
    te = importlib.import_module("megatron_joy.model.backends.te").BLOCKS
    for blocks in (te, portable.BLOCKS):
        assert isinstance(blocks, Blocks)
        assert all(getattr(blocks, name) is not None for name in Blocks.__dataclass_fields__)
    assert (te.name, portable.BLOCKS.name) == ("te", "portable")
