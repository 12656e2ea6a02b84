"""A checkpoint of another model is refused before anything is changed, on all ranks, with the first keys named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_joy.errors import UserError
from tests.checkpoint import worlds
from tests.gloo import run_world


def _refusal(path: Path, model: dict[str, Any]) -> tuple[str, bool]:
    run = worlds.Run.start(worlds.recipe("ep2", **model))
    before = run.boxes()
    try:
        run.load(path)
    except UserError as error:
        same = all(np.array_equal(a[2], b[2]) for a, b in zip(before, run.boxes(), strict=True))
        return str(error), same
    raise AssertionError("loaded")


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another vocabulary": (
        {"vocab_size": 128},
        ["embedding.word_embeddings.weight has shape [64, 32], the model's has [128, 32]"],
    ),
    "more experts": (
        {"n_routed_experts": 8},
        ["experts.experts.linear_fc1.weight has shape [4, 48, 32], the model's has [8, 48, 32]", " more"],
    ),
    "fewer layers": ({"num_hidden_layers": 2}, ["the checkpoint's decoder.layers.4.", "unknown to the model"]),
    "without MTP": ({"num_nextn_predict_layers": 0}, ["the checkpoint's mtp.layers.0.", "unknown to the model"]),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    run_world(worlds.train_and_save, 1, "one", folder, 1)
    return folder / "step_00000001"


@pytest.mark.parametrize("case", CASES)
def test_another_model_is_refused(checkpoint: Path, case: str) -> None:
    model, parts = CASES[case]
    (first, same), (second, same_there) = run_world(_refusal, 2, checkpoint, model)
    assert first == second
    assert same
    assert same_there
    assert "step_00000001 is of another model" in first
    assert "\n" not in first
    for part in parts:
        assert part in first


def test_a_model_with_more_tensors_names_those_that_are_missing(checkpoint: Path) -> None:
    (message, _), _ = run_world(_refusal, 2, checkpoint, {"num_hidden_layers": 6})
    assert "the model's decoder.layers.10." in message
    assert "missing in the checkpoint" in message
    assert " more" in message
