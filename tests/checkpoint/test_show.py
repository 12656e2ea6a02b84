"""What `show` says of a checkpoint is what the ranks held."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_joy.cli.main import main
from tests.checkpoint import worlds
from tests.gloo import run_world


def test_keys_shapes_and_norms_are_those_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = run_world(worlds.train_and_save, 2, "ep2", tmp_path, 1)
    held = worlds.joined([boxes for _, boxes, _ in ranks])
    assert main(["checkpoint", "show", str(tmp_path / "step_00000001"), "--norms", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == held.keys()
    for key, tensor in held.items():
        assert tuple(rows[key]["shape"]) == tensor.shape
        assert rows[key]["dtype"] == "float32"
        assert rows[key]["norm"] == pytest.approx(np.linalg.norm(tensor.astype(np.float64)), rel=1e-12)
    assert main(["checkpoint", "show", str(tmp_path / "step_00000001"), "--prefix", "embedding."]) == 0
    assert capsys.readouterr().out.split() == ["embedding.word_embeddings.weight", "float32", "[64,", "32]"]
