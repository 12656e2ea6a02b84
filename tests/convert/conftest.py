"""One minuscule model, made once: as a checkpoint, as what the training model computes, and exported."""

from pathlib import Path

import pytest

from megatron_joy.convert.export_job import ExportOptions
from megatron_joy.convert.to_hf import to_hf
from tests.convert.worlds import Reference, make_reference
from tests.gloo import run_world


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("fp32")
    run_world(make_reference, 1, folder, "fp32", {})
    return Reference(folder)


@pytest.fixture(scope="session")
def reference_bf16(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("bf16")
    run_world(make_reference, 1, folder, "bf16", {})
    return Reference(folder)


@pytest.fixture(scope="session")
def exported(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in Hugging Face's format, in several files; read only."""
    out = tmp_path_factory.mktemp("hf") / "minuscule"
    to_hf(reference.checkpoint, out, ExportOptions(max_shard_bytes=200_000, verify=False))
    return out


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A model with room for the 256 bytes that every byte-level tokenizer has."""
    folder = tmp_path_factory.mktemp("large")
    run_world(make_reference, 1, folder, "fp32", {"vocab_size": 300, "num_hidden_layers": 2})
    return Reference(folder)
