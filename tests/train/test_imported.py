"""A run starts from imported weights, in any layout, with a fresh optimizer."""

from pathlib import Path

import pytest

from megatron_joy.convert.export_job import ExportOptions
from megatron_joy.convert.from_hf import from_hf
from megatron_joy.convert.to_hf import to_hf
from megatron_joy.recipe import load_recipe
from tests.train.minuscule import EP2, ONE, train


def test_imported_weights_are_trained_on_alike_in_one_process_and_with_experts_spread(
    home: Path, tmp_path: Path
) -> None:
    two = ("train.steps=2", "schedule.decay_steps=0")
    fresh = train(home, tmp_path / "fresh", ONE, *two).rows
    rows_of_tokenizer = ExportOptions(verify=False, tokenizer=None)
    recipe = load_recipe(str(home / "minuscule.toml"), list(two))
    checkpoint = tmp_path / "fresh" / "checkpoints" / "step_00000002"
    from megatron_joy.convert import to_hf as room

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "tokenizer_of", lambda *given: None)  # the shards were made without one
        to_hf(checkpoint, tmp_path / "hf", rows_of_tokenizer)
    losses = {}
    for layout in (ONE, EP2):
        run = tmp_path / f"run{len(layout)}"
        from_hf(tmp_path / "hf", run / "checkpoints" / "step_00000000", recipe)
        done = train(home, run, layout, *two)
        assert done.codes == [0] * len(done.codes), done.printed
        losses[layout] = [row["loss"] for row in done.rows]
        assert [row["step"] for row in done.rows] == [1, 2]
    assert losses[ONE][0] < fresh[0]["loss"]
    assert losses[EP2] == pytest.approx(losses[ONE], rel=1e-5)
