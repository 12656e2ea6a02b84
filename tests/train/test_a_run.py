"""What a run leaves behind: a row a step with the promised keys, events, its recipe, its environment, no secrets."""

import json
import math
import os
import tomllib
from pathlib import Path

import pytest

from megatron_joy.checkpoint.find import latest
from megatron_joy.recipe import load_recipe
from tests.train.conftest import Unbroken
from tests.train.minuscule import (
    BATCH,
    EP2,
    EXPERTS,
    MOE_LAYERS,
    ONE,
    PP2,
    SEQUENCE,
    STEPS,
    numbers,
    train,
)

PHASES = ("data", "forward", "backward", "communication", "optimizer", "validation", "checkpoint")
KEYS = {
    "step",
    "attempt",
    "time",
    "loss",
    "mtp_loss",
    "lr",
    "grad_norm",
    "tokens",
    "samples",
    "step_seconds",
    "tokens_per_second",
    "loss_tokens",
    "expert_load",
    "sources",
    "stage",
    "sequence_length",
    "global_batch_size",
    "tokens_per_second_per_device",
    "model_flops_per_token",
    "mfu",
    "max_violation",
    "worst_violation",
    *(f"{phase}_seconds" for phase in PHASES),
    *(f"{kind}_bytes" for kind in ("parameters", "gradients", "optimizer", "peak")),
}


@pytest.mark.parametrize("layout", [ONE, EP2, PP2], ids=["one", "ep2", "pp2"])
def test_every_step_has_a_row_with_all_keys(unbroken: Unbroken, layout: tuple[str, ...]) -> None:
    rows = unbroken(layout).rows
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert set(row) == KEYS
        assert row["attempt"] == 0
        assert row["samples"] == BATCH * row["step"]
        assert row["tokens"] == SEQUENCE * row["samples"]
        assert 0 < row["loss_tokens"] <= SEQUENCE * BATCH
        assert row["tokens_per_second"] == pytest.approx(SEQUENCE * BATCH / row["step_seconds"])
        assert sum(row["sources"].values()) == BATCH
        assert [len(layer) for layer in row["expert_load"]] == [EXPERTS] * MOE_LAYERS
        for layer in row["expert_load"]:
            assert sum(layer) == pytest.approx(1, abs=1e-5)
            assert min(layer) >= 0
        above = [max(layer) * EXPERTS - 1 for layer in row["expert_load"]]
        assert row["max_violation"] == pytest.approx(above, abs=1e-4)
        assert row["worst_violation"] == pytest.approx(max(above), abs=1e-4)


@pytest.mark.parametrize("layout", [ONE, EP2, PP2], ids=["one", "ep2", "pp2"])
def test_the_phases_fill_a_step(unbroken: Unbroken, layout: tuple[str, ...]) -> None:
    rows = unbroken(layout).rows
    for row in rows:
        inside = sum(row[f"{phase}_seconds"] for phase in PHASES[:5])
        assert 0.5 * row["step_seconds"] < inside < 1.1 * row["step_seconds"] + 0.01
        assert min(row["forward_seconds"], row["backward_seconds"], row["optimizer_seconds"]) > 0
        assert row["validation_seconds"] == 0
    # A save comes after its step's row, so its time is in the next one.
    spent = [row["checkpoint_seconds"] for row in rows]
    assert min(spent[3], spent[6]) > max(spent[1], spent[2])


def test_the_loss_falls(unbroken: Unbroken) -> None:
    for row, before in ((unbroken(ONE).rows[-1], unbroken(ONE).rows[0]),):
        assert before["loss"] == pytest.approx(math.log(264), abs=0.1)
        assert row["loss"] < before["loss"] - 1
        assert row["mtp_loss"] < before["mtp_loss"] - 1


def test_layouts_follow_one_process(unbroken: Unbroken) -> None:
    for layout in (EP2, PP2):
        for mine, reference in zip(unbroken(layout).rows, unbroken(ONE).rows, strict=True):
            assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-5)
            assert mine["mtp_loss"] == pytest.approx(reference["mtp_loss"], rel=1e-5)
            assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
            assert mine["sources"] == reference["sources"]
            for one, other in zip(mine["expert_load"], reference["expert_load"], strict=True):
                assert one == pytest.approx(other, abs=1.5 / (SEQUENCE * BATCH * 2))  # a near tie may fall otherwise


def test_sources_are_counted_by_the_blends_shares(unbroken: Unbroken) -> None:
    counts = {name: sum(row["sources"][name] for row in unbroken(ONE).rows) for name in ("letters", "digits")}
    assert counts == {"letters": STEPS * BATCH * 3 // 4, "digits": STEPS * BATCH // 4}


def test_learning_rates_follow_the_schedule(unbroken: Unbroken) -> None:
    """Two steps of warmup, three at the peak, three down a cosine: written out."""
    cosine = [1e-3 + 9e-3 * (1 + math.cos(math.pi * part)) / 2 for part in (1 / 3, 2 / 3, 1)]
    rates = [row["lr"] for row in unbroken(ONE).rows]
    assert rates == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2, 1e-2, *cosine], rel=1e-12)


def test_the_folder_has_recipe_environment_events_logs_and_checkpoints(unbroken: Unbroken) -> None:
    run = unbroken(EP2).run
    names = {path.name for path in run.iterdir()}
    files = {"recipe.toml", "environment.json", "ledger.json", "metrics.jsonl", "events.jsonl"}
    assert names == {*files, "logs", "launch", "checkpoints"}
    assert {path.name for path in (run / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    resolved = load_recipe(str(run / "recipe.toml"))
    assert resolved.layout.expert_model_parallel_size == 2
    assert tomllib.loads((run / "recipe.toml").read_text())["run"]["folder"] == str(run)
    assert latest(run / "checkpoints", full=True).checkpoint.step == STEPS  # type: ignore[union-attr]
    assert unbroken(EP2).checkpoints == ["step_00000003", "step_00000006", "step_00000008"]


def test_events_tell_the_layout_first_then_checkpoints_then_the_end(unbroken: Unbroken) -> None:
    events = unbroken(EP2).events
    assert [(event["kind"], event["step"]) for event in events] == [
        ("start", 0),
        ("checkpoint", 3),
        ("checkpoint", 6),
        ("checkpoint", 8),
        ("finish", 8),
    ]
    assert events[0]["world_size"] == 2
    assert events[0]["layout"] == "EP2 DP2"


def _with_a_secret() -> None:
    os.environ["SECRET_TOKEN"] = "hunter2-in-the-environment"


def test_no_variable_of_the_environment_is_written_anywhere(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = train(
        home, run, ONE, "train.steps=2", "schedule.decay_steps=0", "run.tensorboard=true", before=_with_a_secret
    )
    assert ended.codes == [0]
    assert any((run / "events").iterdir())
    for path in (path for path in run.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert b"hunter2" not in content, path
        assert b"SECRET_TOKEN" not in content, path
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["megatron-core"].startswith("0.19")
    assert not set(environment) & set(os.environ)


def test_only_the_newest_checkpoints_are_kept(home: Path, tmp_path: Path) -> None:
    ended = train(home, tmp_path / "run", ONE, "checkpoint.interval=1", "checkpoint.keep_last=2")
    assert ended.checkpoints == ["step_00000007", "step_00000008"]
    assert len(ended.told("checkpoint")) == STEPS


def test_a_finished_run_that_is_started_again_trains_nothing(home: Path, tmp_path: Path) -> None:
    first = train(home, tmp_path / "run", ONE)
    before = numbers(first.rows)
    again = train(home, tmp_path / "run", ONE)
    assert again.codes == [0]
    assert numbers(again.rows) == before
    assert [event["kind"] for event in again.events if event["attempt"] == 1] == ["resume", "finish"]


def test_a_run_can_be_made_longer(home: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    flat = ("schedule.decay_steps=0",)
    train(home, tmp_path / "run", ONE, "train.steps=5", *flat)
    longer = train(home, tmp_path / "run", ONE, *flat)
    assert longer.codes == [0]
    assert numbers(longer.rows) == numbers(unbroken(ONE, *flat).rows)


def test_the_gradient_norm_is_told_also_without_clipping(home: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    ended = train(home, tmp_path / "run", ONE, "optimizer.clip_grad=0", "train.steps=2", "schedule.decay_steps=0")
    assert ended.rows[0]["grad_norm"] == pytest.approx(unbroken(ONE).rows[0]["grad_norm"], rel=1e-6)
