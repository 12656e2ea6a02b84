"""Transformer Engine and torch in one process: one cuDNN, and none of it where no GPU is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_joy.platform import cudnn


def test_the_same_cudnn_is_no_problem_and_two_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    assert cudnn.mixed((9, 19, 0)) is None
    said = cudnn.mixed((9, 14, 0))
    assert said is not None
    assert "cuDNN 9.14.0 and torch 91900; set CUDNN_HOME" in said


def test_a_cudnn_that_torch_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise RuntimeError("cuDNN version incompatibility: 9.19 against 9.14\nmore")

    monkeypatch.setattr(torch.backends.cudnn, "version", refuse)
    said = cudnn.mixed((9, 14, 0))
    assert said is not None
    assert "torch refuses its cuDNN (cuDNN version incompatibility: 9.19 against 9.14); set" in said


def test_a_cudnn_that_the_user_names_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDNN_PATH", "/somewhere")
    monkeypatch.delenv("CUDNN_HOME", raising=False)
    assert not cudnn.prefer_torchs()
    assert "CUDNN_HOME" not in os.environ


def test_without_a_gpu_megatron_core_sees_no_transformer_engine(tmp_path: Path) -> None:
    """Its kernels would be taken where nothing can run them; one that fails at import would end Megatron-core's."""
    (tmp_path / "transformer_engine").mkdir()
    broken = tmp_path / "transformer_engine" / "__init__.py"
    broken.write_text("raise FileNotFoundError('libtransformer_engine.so')\n")
    program = (
        "from megatron_joy.platform import process\n"
        "from megatron.core.transformer.moe import moe_utils\n"
        "from megatron.core.extensions.transformer_engine import HAVE_TE\n"
        "assert not HAVE_TE\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    hidden = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", program], env=hidden, check=True)
