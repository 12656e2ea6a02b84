"""The mean of a run's checkpoints is exported and trained on like any other."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_joy.checkpoint.find import open_checkpoint
from megatron_joy.checkpoint.storage import Reader
from megatron_joy.cli.main import main
from megatron_joy.convert import to_hf as room
from megatron_joy.convert.to_hf import ExportOptions, to_hf
from tests.train.conftest import Unbroken
from tests.train.minuscule import EP2, train

NORM = "decoder.final_norm.weight"


def test_a_run_starts_from_a_mean_and_its_export_has_the_mean(home: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    source, run = unbroken(EP2).run, tmp_path / "merged"
    out = run / "checkpoints" / "step_00000000"
    assert main(["checkpoint", "merge", str(source), "--steps", "3,6", "--out", str(out)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "tokenizer_of", lambda *given: None)  # the shards were made without one
        to_hf(out, tmp_path / "hf", ExportOptions(verify=False, tokenizer=None))
    exported = {
        key: value for file in (tmp_path / "hf").glob("*.safetensors") for key, value in load_file(file).items()
    }
    readers = [Reader(open_checkpoint(source / "checkpoints" / f"step_{step:08d}")) for step in (3, 6)]

    mean = np.mean([reader.tensor(NORM).double().numpy() for reader in readers], axis=0).astype(np.float32)
    assert np.array_equal(exported["model.norm.weight"], mean)
    started = train(home, run, EP2, "train.steps=2", "schedule.decay_steps=0")
    assert started.codes == [0, 0], started.printed
    assert started.told("resume")[0].startswith("resumed from step_00000000")
    first, *_ = started.rows
    at = {row["step"]: row["loss"] for row in unbroken(EP2).rows}
    # The same samples as the run's first update, by weights that have been trained.
    assert first["loss"] < at[1]
