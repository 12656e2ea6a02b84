"""Delayed FP8 scaling in a run: its state comes back to the bit, and what is computed twice leaves no trace in it."""

from pathlib import Path

import pytest

from megatron_joy.checkpoint.find import latest
from megatron_joy.checkpoint.load import load_checkpoint
from megatron_joy.checkpoint.storage import Reader
from megatron_joy.model.build import build_model
from megatron_joy.platform import process as platform
from megatron_joy.recipe import load_recipe
from megatron_joy.train.step import Trainer
from tests.gloo import WorldFailed, run_world
from tests.train.chaos import tensors_of
from tests.train.minuscule import EP2, at_step, die, last_rows, numbers, train, validation

WIDTHS = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "moe_intermediate_size": 32}
RANKS = {"q_lora_rank": 32, "kv_lora_rank": 16}
SCALING = ("precision.fp8.recipe=delayed", "precision.fp8.emulate=true", "precision.fp8.amax_history_len=6")
DELAYED = (*(f"model.{key}={value}" for key, value in (WIDTHS | RANKS).items()), *SCALING)
FP8 = "optimizer.state.fp8_"


def reads_back(recipe: str, overrides: tuple[str, ...], checkpoint_of: str) -> list[tuple[str, bool]]:
    """In one process: each tensor of scales of a checkpoint, and whether the loaded model has its bits."""
    from megatron_joy.checkpoint.contents import pieces_of, scale_boxes

    own = load_recipe(recipe, list(overrides))
    process = platform.start(own.layout, own.seed)
    trainer = Trainer(own, process, build_model(own, process))
    checkpoint = latest(Path(checkpoint_of) / "checkpoints", full=True).checkpoint
    assert checkpoint is not None
    load_checkpoint(checkpoint, chunks=trainer.chunks, optimizer=trainer.optimizer, process=process)
    found = scale_boxes(pieces_of(trainer.chunks, process), trainer.chunks, process, to_write=True)
    reader = Reader(checkpoint)
    stored = [key for key in reader.tensors if key.startswith(FP8)]
    assert sorted(stored) == sorted(found)
    return [(key, bool((reader.tensor(key) == found[key].boxes[0].data).all())) for key in stored]


def test_a_killed_run_that_checks_itself_has_the_bits_of_one_that_does_not(home: Path, tmp_path: Path) -> None:
    """EP 2. The killed one computes every second update twice and validates after each third, on other data."""
    plain = train(home, tmp_path / "plain", EP2, *DELAYED)
    assert set(plain.codes) == {0}
    watching = (*DELAYED, "guards.recheck_interval=2", *validation(home, 3))
    with pytest.raises(WorldFailed):
        train(home, tmp_path / "killed", EP2, *watching, before=at_step, inputs=(5, die))
    ended = train(home, tmp_path / "killed", EP2, *watching)
    assert set(ended.codes) == {0}
    assert numbers(last_rows(ended.rows)) == numbers(plain.rows)
    mine, theirs = tensors_of(ended.run), tensors_of(plain.run)
    assert mine == theirs
    scales = [key for key in mine if key.startswith(FP8)]
    # Four attentions of five matrices, two dense MLPs, two MoE layers of two and two, the projection: each with scale
    # and history in both directions.
    assert len(scales) == 4 * (20 + 4 + 8 + 1)
    assert len({mine[key] for key in scales}) > 50  # they are of their own products

    arguments = (str(home / "minuscule.toml"), DELAYED, str(plain.run))
    (equal,) = run_world(reads_back, 1, *arguments)
    assert len(equal) == len(scales) and all(same for _, same in equal)
