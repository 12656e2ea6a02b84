"""The stand-ins are seen by Megatron-core alone: torch and what else uses it are as they were."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_joy.platform import cpu

ROOT = Path(__file__).parents[2]


def logits(*arguments: str) -> dict[str, Any]:
    """What `transformers_logits.py` printed."""
    command = [sys.executable, "-m", "tests.platform.transformers_logits", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_transformers_gives_the_same_bits_beside_megatron_core() -> None:
    beside, alone = logits("megatron"), logits()
    assert beside["changed"] == []
    assert beside["frequencies"] == alone["frequencies"]
    assert beside["logits"] == alone["logits"]


def test_megatron_cores_modules_see_a_cpu_where_they_ask_for_a_gpu() -> None:
    if not cpu.install():
        pytest.skip("this machine has a GPU: nothing is to be replaced")
    from megatron.core.optimizer import clip_grads

    seen = clip_grads.torch
    assert seen is not torch
    assert seen.cuda.current_device() == torch.device("cpu")
    assert seen.zeros(2, device="cuda").device == torch.device("cpu")
    assert seen.empty(2, device=torch.device("cuda", 0), pin_memory=True).device == torch.device("cpu")
    assert seen.Tensor is torch.Tensor and seen.nn is torch.nn
    assert not seen.cuda.is_available()


def test_installing_after_megatron_core_is_an_error_of_the_caller() -> None:
    program = (
        "import sys, types\n"
        "from megatron_joy.platform import cpu\n"
        "sys.modules['megatron.core'] = types.ModuleType('megatron.core')\n"
        "try:\n"
        "    cpu.install()\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
        cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert "was imported before" in done.stdout


def test_installing_twice_puts_in_one_finder() -> None:
    cpu.install()
    before = list(sys.meta_path)
    cpu.install()
    assert sys.meta_path == before


def test_with_a_gpu_install_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(sys.meta_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu.install() is False
    assert sys.meta_path == before
