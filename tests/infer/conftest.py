"""Two minuscule models: one of random weights, one trained until its MTP layer is worth asking."""

from pathlib import Path

import pytest

from megatron_joy.convert.export_job import ExportOptions
from megatron_joy.convert.to_hf import to_hf
from megatron_joy.infer.decoder import Decoder
from megatron_joy.infer.weights import build_decoder, open_weights
from tests.convert.worlds import Reference, make_reference
from tests.gloo import run_world
from tests.infer.training import train_on_a_pattern


def decoder_of(path: Path) -> Decoder:
    with open_weights(path) as weights:
        return build_decoder(weights, "fp32")


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("random")
    run_world(make_reference, 1, folder, "fp32", {})
    return Reference(folder)


@pytest.fixture(scope="session")
def exported(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "random"
    to_hf(reference.checkpoint, out, ExportOptions(verify=False))
    return out


@pytest.fixture(scope="session")
def decoder(exported: Path) -> Decoder:
    return decoder_of(exported)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("trained")
    run_world(train_on_a_pattern, 1, folder)
    return decoder_of(folder / "step_00000060")
