"""A checkpoint from elsewhere runs no code: its index is held against its hash and against a list of classes."""

import hashlib
import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from megatron_joy.checkpoint.find import open_checkpoint
from megatron_joy.checkpoint.marker import Checkpoint, FileEntry, write_marker
from megatron_joy.checkpoint.storage import INDEX, Reader, read_index
from megatron_joy.errors import WorkError
from tests.checkpoint import worlds
from tests.gloo import run_world


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    run_world(worlds.train_and_save, 1, "one", tmp_path, 0)
    return open_checkpoint(tmp_path / "step_00000000", full=True)


class _Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def _with_index(checkpoint: Checkpoint, content: bytes) -> Checkpoint:
    """The checkpoint with another index, committed as if it were its own."""
    (checkpoint.path / INDEX).write_bytes(content)
    entry = FileEntry(INDEX, len(content), blake3(content).hexdigest())
    files = tuple(entry if old.name == INDEX else old for old in checkpoint.marker.files)
    write_marker(checkpoint.path, replace(checkpoint.marker, files=files))
    return open_checkpoint(checkpoint.path, full=True)


def test_a_call_hidden_in_the_index_is_not_made(checkpoint: Checkpoint, tmp_path: Path) -> None:
    evil = _with_index(checkpoint, pickle.dumps(_Evil(tmp_path / "touched")))
    with pytest.raises(WorkError, match=r"pathlib.*no index consists of"):
        read_index(evil)
    assert not (tmp_path / "touched").exists()


def test_an_index_that_is_not_the_committed_one_is_not_even_opened(checkpoint: Checkpoint) -> None:
    content = (checkpoint.path / INDEX).read_bytes()
    (checkpoint.path / INDEX).write_bytes(content[:-1] + b"x")
    with pytest.raises(WorkError, match=r"\.metadata: expected blake3"):
        read_index(checkpoint)


def test_an_index_that_points_outside_the_checkpoint_is_refused(checkpoint: Checkpoint) -> None:
    index = read_index(checkpoint)
    next(iter(index.storage_data.values())).relative_path = "../../secret"
    with pytest.raises(WorkError, match=r"points to \.\./\.\./secret"):
        read_index(_with_index(checkpoint, pickle.dumps(index)))


def test_tensors_are_read_without_a_process_group_and_the_marker_is_plain_json(checkpoint: Checkpoint) -> None:
    reader = Reader(checkpoint)
    assert list(reader.tensor("decoder.layers.3.mlp.experts.experts.linear_fc1.weight").shape) == [4, 48, 32]
    content = json.loads((checkpoint.path / "COMMITTED.json").read_text())
    assert content["files"] == [asdict(entry) for entry in checkpoint.marker.files]
    assert hashlib.sha256(checkpoint.recipe_path.read_bytes()).hexdigest() == content["recipe_sha256"]
