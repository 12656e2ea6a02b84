"""Every name of Megatron-core that we replace still exists and is still what it was when we replaced it."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_joy.model import mtp_loss
from megatron_joy.platform import cpu, replacements

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pristine() -> dict[str, Any]:
    """What `pristine.py` saw."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.platform.pristine"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def about(entry: Any, name: str, said: str) -> str:
    return f"Megatron-core changed at {entry.module}.{name}, which we replace because: {entry.reason}. {said}"


@pytest.mark.parametrize("entry", cpu.REPLACEMENTS, ids=lambda e: f"{e.module}.{e.name}")
def test_a_replaced_name_is_still_there_and_called_as_ours(entry: cpu.Replacement, pristine: dict[str, Any]) -> None:
    theirs = pristine[f"{entry.module}:{entry.name}"]
    assert "missing" not in theirs, about(entry, entry.name, f"It is gone: {theirs['missing']}")
    if isinstance(entry.value, bool):
        assert theirs["kind"] == "bool", about(entry, entry.name, f"It was a flag and is {theirs['kind']}.")
        return
    if isinstance(entry.value, type):
        assert theirs["kind"] == "type", about(entry, entry.name, f"It was a class and is {theirs['kind']}.")
        return
    if entry.name == "jit_fuser":  # a decorator: torch.compile, torch.jit.script or one that does nothing
        assert theirs["kind"] in ("function", "partial"), about(entry, entry.name, f"It is {theirs['kind']}.")
        return
    ours = list(inspect.signature(entry.value).parameters)
    said = f"Its parameters are {theirs.get('parameters')}, ours {ours}."
    assert theirs.get("parameters") == ours, about(entry, entry.name, said)


@pytest.mark.parametrize("entry", cpu.REWRITES, ids=lambda e: f"{e.module}.{e.qualname}")
def test_a_rewritten_function_still_names_cuda(entry: cpu.Rewrite, pristine: dict[str, Any]) -> None:
    theirs = pristine[f"{entry.module}:{entry.qualname}"]
    assert "missing" not in theirs, about(entry, entry.qualname, f"It is gone: {theirs['missing']}")
    moves, types = "cuda" in theirs["names"], any("torch.cuda." in text for text in theirs["texts"])
    needed = moves if ".cuda()" in entry.reason else types
    assert needed, about(entry, entry.qualname, "It no longer does that: the entry may go.")


@pytest.mark.parametrize("entry", [*replacements.ALWAYS, *replacements.BUILDING], ids=lambda e: f"{e.module}.{e.name}")
def test_a_rebound_name_is_still_there(entry: replacements.Rebinding, pristine: dict[str, Any]) -> None:
    theirs = pristine[f"{entry.module}:{entry.name}"]
    assert "missing" not in theirs, about(entry, entry.name, f"It is gone: {theirs['missing']}")


@pytest.mark.parametrize("entry", replacements.OVERRIDDEN, ids=lambda e: f"{e.module}.{e.qualname}")
def test_an_overridden_method_is_still_there(entry: replacements.Override, pristine: dict[str, Any]) -> None:
    theirs = pristine[f"{entry.module}:{entry.qualname}"]
    assert "missing" not in theirs, about(entry, entry.qualname, f"It is gone: {theirs['missing']}")
    assert theirs["parameters"][:3] == ["self", "input", "weight"], about(entry, entry.qualname, "It takes others now.")


def test_our_mtp_loss_takes_what_megatron_core_passes(pristine: dict[str, Any]) -> None:
    entry = replacements.MTP_LOSS
    theirs = pristine[f"{entry.module}:{entry.name}"]["parameters"]
    ours = inspect.signature(mtp_loss.process_mtp_loss).parameters
    named = [name for name, parameter in ours.items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    assert set(named) <= set(theirs), about(entry, entry.name, f"It takes {theirs} now.")
    assert named == theirs[: len(named)], about(entry, entry.name, f"The order is now {theirs}.")


def test_on_a_machine_with_a_gpu_nothing_is_replaced(pristine: dict[str, Any]) -> None:
    seen = pristine["installed"]
    assert seen["returned"] is False
    assert seen["finders"] == []
    assert seen["rebound"] == [] and seen["modules"] > 100
    ours = [key for key, value in pristine.items() if "megatron_joy" in str(value.get("home"))]
    assert ours == []


def test_without_a_gpu_each_replacement_and_rewrite_is_in_place() -> None:
    if not cpu.install():
        pytest.skip("this machine has a GPU: nothing is to be replaced")
    import importlib

    for entry in cpu.REPLACEMENTS:
        assert getattr(importlib.import_module(entry.module), entry.name) is entry.value, entry
    for rewrite in cpu.REWRITES:
        code = cpu.resolve(importlib.import_module(rewrite.module), rewrite.qualname).__code__
        assert "cuda" not in code.co_names, rewrite
        assert "torch.cuda." not in str(code.co_consts), rewrite
