"""What is watched beside the loss: a step computed twice, slow ranks, each layer's gradients and activations."""

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_joy.train.features.stragglers import slow_ranks
from tests.train.conftest import Unbroken
from tests.train.minuscule import BATCH, EP2, ONE, PP2, SEQUENCE, numbers, read_lines, train

WATCHED = ("guards.recheck_interval=2", "guards.statistics_interval=3", "guards.straggler_interval=4")
SHORT = ("train.steps=3", "schedule.decay_steps=0")
LAYERS = [f"decoder.layers.{i}" for i in range(6)]  # attention and feed-forward of three layers count apart
OTHERS = ["embedding", "decoder", "output_layer", "mtp"]


def late_data(rank: int) -> None:
    """A rank whose data comes half a second late."""
    from megatron_joy.data.supply import Supply

    give = Supply.__next__

    def then(supply: Any) -> Any:
        time.sleep(0.5)
        return give(supply)

    if int(os.environ["RANK"]) == rank:
        Supply.__next__ = then  # type: ignore[method-assign]


def test_watching_changes_no_bit_and_names_the_slow_rank(home: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    ended = train(home, tmp_path / "run", EP2, *WATCHED, before=late_data, inputs=(1,))
    assert ended.codes == [0, 0]
    assert numbers(ended.rows) == numbers(unbroken(EP2).rows)
    assert [row["expert_load"] for row in ended.rows] == [row["expert_load"] for row in unbroken(EP2).rows]
    looked = [row for row in ended.rows if "slow_ranks" in row]
    assert [row["step"] for row in looked] == [4, 8]
    for row in looked:
        assert [1, "data"] in row["slow_ranks"]
        assert row["rank_seconds"]["data"][1] > 0.5
    (said, *_) = [event for event in ended.events if event["kind"] == "straggler" and event["phase"] == "data"]
    assert said["rank"] == 1
    assert "rank 1 is slow in waiting for data" in said["message"]
    rows = read_lines(ended.run / "statistics.jsonl")
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        whole = math.sqrt(sum(layer["gradient_norm"] ** 2 for layer in row["layers"].values()))
        assert whole == pytest.approx(ended.rows[row["step"] - 1]["grad_norm"], rel=1e-6)


def test_statistics_are_those_of_one_process_in_any_layout(home: Path, tmp_path: Path) -> None:
    found = {}
    for name, layout in (("one", ONE), ("ep2", EP2), ("pp2", PP2)):
        ended = train(
            home, tmp_path / name, layout, *SHORT, "guards.statistics_interval=3", before=_counted, inputs=(tmp_path,)
        )
        assert set(ended.codes) == {0}
        (found[name],) = [row["layers"] for row in read_lines(ended.run / "statistics.jsonl")]
    assert sorted(found["one"]) == sorted([*LAYERS, *OTHERS])
    hidden = 32
    assert _tokens(tmp_path) == dict.fromkeys(LAYERS, SEQUENCE * BATCH * hidden)
    for name in ("ep2", "pp2"):
        assert sorted(found[name]) == sorted(found["one"])
        for layer, numbers_of in found["one"].items():
            assert found[name][layer] == pytest.approx(numbers_of, rel=1e-4)


def _counted(folder: Path) -> None:
    """How many values each layer's sums are of, written beside the run by rank 0."""
    import json

    from megatron_joy.train.features import statistics

    add = statistics._added

    def then(parts: Any) -> Any:
        sums = add(parts)
        counts = {layer: values[2] for layer, values in sums.items() if values[2]}
        if counts and os.environ["RANK"] == "0":
            (folder / "counts.json").write_text(json.dumps(counts))
        return sums

    statistics._added = then


def _tokens(folder: Path) -> dict[str, float]:
    import json

    return json.loads((folder / "counts.json").read_text())


def flip_a_bit(step: int, rank: int) -> None:
    """In one update one bit of one gradient on one rank turns over, after the first pass."""
    import torch

    from megatron_joy.train.step import Trainer

    if int(os.environ["RANK"]) != rank:
        return
    finalize, compute, at = Trainer._finalize, Trainer.step, [0]

    def numbered(trainer: Any, number: int, batches: Any) -> Any:
        at[0] = number
        return compute(trainer, number, batches)

    def then(trainer: Any, *arguments: Any, **more: Any) -> None:
        if at[0] == step:
            named = dict(trainer.models[0].named_parameters())
            grad = named["decoder.layers.2.self_attention.linear_proj.weight"].main_grad
            grad.view(torch.int32).view(-1)[7] ^= 1
        finalize(trainer, *arguments, **more)

    Trainer.step, Trainer._finalize = numbered, then  # type: ignore[method-assign]


def test_one_wrong_bit_stops_the_run_and_names_rank_and_parameter(home: Path, tmp_path: Path) -> None:
    failed = train(home, tmp_path / "run", EP2, "guards.recheck_interval=2", before=flip_a_bit, inputs=(4, 1))
    assert failed.codes == [1, 1]
    (line,) = [line for line in failed.printed[0].splitlines() if line.startswith("error: ")]
    parameter = "the gradient of decoder.layers.2.self_attention.linear_proj.weight"
    assert f"step 4: computed twice, rank 1 got other bits: {parameter}; nothing of this step is saved" in line
    assert [event["step"] for event in failed.events if event["kind"] == "mismatch"] == [4]
    assert failed.checkpoints == ["step_00000003"]


def test_a_rank_is_slow_against_the_median_and_not_for_a_trifle() -> None:
    usual = [0.01, 1.0, 0.2, 0.1]
    table = [usual, [0.01, 2.0, 0.01, 0.1], usual, [0.6, 1.0, 0.2, 0.1]]
    assert slow_ranks(table, 1.5) == [(1, "forward_backward"), (3, "data")]
    assert slow_ranks(table, 2.5) == [(3, "data")]
    assert slow_ranks([usual, [0.02, 1.0, 0.9, 0.1]], 1.5) == []  # a hundredth of a step; waiting is no fault
    assert slow_ranks([usual, [0.01, 1.6, 0.2, 0.1]], 1.5) == [(1, "forward_backward")]  # of two, the faster one
