"""The format is Megatron-core's: its own loader, which shares no code with ours, reads the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_joy.checkpoint.find import open_checkpoint
from megatron_joy.checkpoint.storage import Reader
from tests.checkpoint import worlds
from tests.gloo import run_world


def _read_with_megatron(path: Path, layout: str) -> Any:
    run = worlds.Run.start(worlds.recipe(layout))
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    (chunk,) = (wrapped.module for wrapped in run.trainer.chunks)
    run.disturb()
    state = chunk.sharded_state_dict(metadata={"dp_cp_group": run.process.groups.dp_cp})
    _, state = extract_matching_values(state, lambda entry: isinstance(entry, ShardedObject))
    loaded = dist_checkpointing.load(state, str(path))
    loaded.pop("iteration")
    chunk.load_state_dict(loaded, strict=False)
    return [box for box in run.boxes() if not box[0].startswith("optimizer.")]


def test_megatron_core_reads_our_weights_under_another_layout(tmp_path: Path) -> None:
    ranks = run_world(worlds.train_and_save, 2, "ep2", tmp_path, 1)
    before = worlds.joined([boxes for _, boxes, _ in ranks])
    after = worlds.joined(run_world(_read_with_megatron, 2, tmp_path / "step_00000001", "pp2"))
    assert after.keys() == {key for key in before if not key.startswith("optimizer.")}
    assert [key for key in after if not np.array_equal(before[key], after[key])] == []


def _read_with_megatron_by_name(path: Path) -> Any:
    """Whole tensors, asked for by the names and shapes of our index."""
    worlds.Run.start(worlds.recipe("one"))
    from megatron.core import dist_checkpointing

    wanted = {
        key: dist_checkpointing.ShardedTensor.from_rank_offsets(key, torch.empty(entry.size))
        for key, entry in Reader(open_checkpoint(path)).tensors.items()
    }
    loaded = dist_checkpointing.load(wanted, str(path))
    return {key: loaded[key].numpy() for key in wanted}


def test_megatron_core_reads_every_tensor_optimizer_state_included(tmp_path: Path) -> None:
    ranks = run_world(worlds.train_and_save, 2, "tp2ep2", tmp_path, 1)
    before = worlds.joined([boxes for _, boxes, _ in ranks])
    (after,) = run_world(_read_with_megatron_by_name, 1, tmp_path / "step_00000001")
    assert after.keys() == before.keys()
    assert [key for key in after if not np.array_equal(before[key], after[key])] == []
