"""A merged checkpoint is the mean, to the bit, and a checkpoint like any other."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_joy.checkpoint.find import latest, open_checkpoint
from megatron_joy.checkpoint.marker import folder_name
from megatron_joy.checkpoint.storage import Reader
from megatron_joy.cli.main import main
from tests.checkpoint import worlds
from tests.checkpoint.fakes import make_checkpoint
from tests.gloo import run_world

STEPS = (1, 2, 3)


def _train_and_save(folder: Path, layout: str, dtype: str) -> Any:
    """Saves after each step; what this rank holds at each."""
    run = worlds.Run.start(worlds.recipe(layout, dtype))
    held = []
    for step in STEPS:
        run.train(step, step)
        run.save(folder, step)
        held.append(run.boxes())
    return held


def _load_weights(path: Path) -> Any:
    from megatron_joy.checkpoint.load import load_checkpoint

    run = worlds.Run.start(worlds.recipe("ep2"))
    run.disturb()
    load_checkpoint(open_checkpoint(path, full=True), chunks=run.trainer.chunks, optimizer=None, process=run.process)
    run.trainer.optimizer.reload_model_params()
    return run.boxes(), run.train(4, 4)


@pytest.mark.parametrize(("layout", "dtype"), [("ep2", "fp32"), ("one", "bf16")])
def test_every_element_is_the_mean_of_the_three_rounded_once(layout: str, dtype: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "run" / "checkpoints", tmp_path / "merged" / "checkpoints" / "step_00000000"
    ranks = run_world(_train_and_save, worlds.world_size(layout), folder, layout, dtype)
    assert main(["checkpoint", "merge", str(folder.parent), "--last", "3", "--out", str(out)]) == 0
    held = [worlds.joined([rank[i] for rank in ranks]) for i in range(len(STEPS))]
    reader = Reader(open_checkpoint(out, full=True))
    assert {key for key in held[0] if not key.startswith("optimizer.")} == set(reader.tensors)
    assert any(key.endswith("router.expert_bias") for key in reader.tensors)
    for key in reader.tensors:
        master = f"optimizer.state.param.{key}"
        sources = [each.get(master, each[key]) for each in held]
        mean = (sum(each.astype(np.float64) for each in sources) / 3).astype(np.float32)
        expected = torch.from_numpy(mean).bfloat16().float().numpy() if _is_bf16(reader, key) else mean
        assert np.array_equal(reader.tensor(key).float().numpy(), expected), key
        assert not np.array_equal(expected, held[-1][key]) or not expected.any(), key
    state = open_checkpoint(out).state["imported"]
    assert [source["step"] for source in state["merged"]] == list(STEPS)
    assert state["run"] == "run"
    assert (tmp_path / "merged" / "recipe.toml").read_bytes() == (folder / "step_00000003/recipe.toml").read_bytes()
    if layout == "ep2":
        loaded = run_world(_load_weights, 2, out)
        found = worlds.joined([boxes for boxes, _ in loaded])
        assert all(np.array_equal(found[key], reader.tensor(key).numpy()) for key in reader.tensors)
        assert np.isfinite(loaded[0][1]).all()


def _is_bf16(reader: Reader, key: str) -> bool:
    return str(reader.tensors[key].properties.dtype) == "torch.bfloat16"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (100, 200, 300, 350):
        make_checkpoint(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        (["--last", "3"], "checkpoints 200, 300, 350 lie 100, 50 steps apart, a mean is of equally spaced ones"),
        (["--steps", "100,250"], "--steps 250: "),
        (["--steps", "100,two"], "--steps 100,two: expected numbers"),
        (["--steps", "100"], "1 checkpoints to merge, expected 2 or more; there are 100, 200, 300, 350"),
        (["--last", "5"], "4 checkpoints to merge, expected 5 or more"),
        ([], "either with --last K or with --steps A,B,C"),
        (["--last", "2", "--steps", "100,200"], "either with --last K or with --steps A,B,C"),
    ],
)
def test_a_choice_that_makes_no_mean_is_refused_in_a_line(
    run: Path, choice: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run.parent / "merged"
    assert main(["checkpoint", "merge", str(run), *choice, "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_a_source_that_is_damaged_an_output_that_exists_and_another_step_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = run / "checkpoints" / folder_name(200) / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    for out, told in (
        (run.parent / "merged", f"{folder_name(200)} is not a whole checkpoint: __0_0.distcp"),
        (run, f"{run}: is there already"),
        (run.parent / folder_name(7), f"name it {run.parent / folder_name(0)}"),
    ):
        assert main(["checkpoint", "merge", str(run), "--steps", "100,200", "--out", str(out)]) == 2
        assert told in capsys.readouterr().err
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]


def _two_models(folder: Path) -> None:
    first = worlds.Run.start(worlds.recipe("one"))
    first.save(folder, 1)
    worlds.Run.start(worlds.recipe("one", n_routed_experts=8)).save(folder, 2)


def test_another_models_checkpoint_is_refused_and_diff_names_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    run_world(_two_models, 1, folder)
    assert main(["checkpoint", "merge", str(tmp_path / "run"), "--last", "2", "--out", str(tmp_path / "out")]) == 2
    key = "decoder.layers.3.mlp.experts.experts.linear_fc1.weight"
    assert f"is of another model than {folder / folder_name(1)}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    whole = latest(folder).checkpoint
    assert whole is not None
    first, second = str(folder / folder_name(1)), str(whole.path)
    assert main(["checkpoint", "diff", first, second, "--prefix", "decoder", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows[key]["status"] == "shape"
    assert rows[key]["shape_b"][0] == 2 * rows[key]["shape_a"][0]
    shared = rows["decoder.layers.0.self_attention.linear_q_down_proj.weight"]
    assert (shared["status"], shared["max_absolute"]) == ("equal", 0.0)  # initial weights depend on name and seed


def test_diff_tells_the_largest_differences_and_norms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = run_world(_train_and_save, 2, tmp_path, "ep2", "fp32")
    held = [worlds.joined([rank[i] for rank in ranks]) for i in (0, 2)]
    paths = [str(tmp_path / folder_name(step)) for step in (1, 3)]
    assert main(["checkpoint", "diff", *paths, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["key"] for row in rows} == held[0].keys()
    for row in rows:
        a, b = (each[row["key"]].astype(np.float64) for each in held)
        apart, scale = np.abs(a - b), np.maximum(np.abs(a), np.abs(b))
        assert row["status"] == ("values" if apart.any() else "equal")
        assert row["max_absolute"] == apart.max()
        assert row["max_relative"] == pytest.approx((apart[scale > 0] / scale[scale > 0]).max(initial=0), rel=1e-12)
        assert (row["norm_a"], row["norm_b"]) == pytest.approx((np.linalg.norm(a), np.linalg.norm(b)), rel=1e-12)
    assert main(["checkpoint", "diff", paths[0], paths[0]]) == 0
    assert capsys.readouterr().out == f"{len(rows)} of {len(rows)} tensors are equal\n"
