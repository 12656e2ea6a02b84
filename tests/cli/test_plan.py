"""`joy plan`: the table's figures are the paper's, and those of the shards where there are any."""

import json
from pathlib import Path

import pytest

from megatron_joy.cli.main import main
from megatron_joy.recipe import dump_recipe
from megatron_joy.recipe.schema import Recipe
from tests.data.tiny_shards import recipe_table, some_texts, write_shard_set


def test_the_plan_of_the_48b_has_the_papers_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "joyai_48b_a3b", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens"] == pytest.approx(20.7e12, rel=1e-4)
    assert [stage["name"] for stage in plan["stages"]][:2] == ["warmup", "stable"]
    assert plan["stages"][0]["learning_rate"] == [0.0, 4.2e-4]
    assert plan["stages"][0]["batch_tokens"] == [3200 * 4096, 9216 * 4096]
    assert plan["stages"][-1]["sequence_length"] == 131072
    assert sum(source["tokens"] for source in plan["sources"]) == pytest.approx(plan["tokens"], abs=10)
    assert {source["epochs"] for source in plan["sources"]} == {None}  # no shards here
    mid = {one["source"]: one["share"] for one in plan["stages"][3]["blend"]}
    assert mid["synthetic"] > 0.6  # arXiv 2604.03044, 2.3.4
    assert main(["plan", "joyai_48b_a3b"]) == 0
    printed = capsys.readouterr().out
    assert "550,313 updates" in printed
    assert "synthetic" in printed


@pytest.mark.parametrize("columns", [None, "80"])
def test_no_figure_is_cut_short_in_a_file_or_on_a_narrow_terminal(
    columns: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert main(["plan", "joyai_48b_a3b"]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    if columns is None:
        assert "too large by" in printed


def test_epochs_are_counted_on_the_manifests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = write_shard_set(tmp_path / "letters", some_texts(2, 20, seed=1, longest=60), "letters")
    table = recipe_table([{"manifest": str(tmp_path / "letters")}], 16, steps=10, global_batch_size=8)
    path = tmp_path / "recipe.toml"
    path.write_text(dump_recipe(Recipe.model_validate(table)))
    assert main(["plan", str(path), "--json"]) == 0
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    assert source["tokens"] == 10 * 8 * 16
    assert source["epochs"] == pytest.approx(1280 / len(tokens))
    assert (source["second_epoch_from_update"], source["max_epochs"]) == (None, None)
    assert main(["plan", str(path), "--json", "train.steps=30"]) == 0
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    assert 2 < source["epochs"] < 4
    assert source["second_epoch_from_update"] == len(tokens) // (8 * 16) + 1
    assert main(["plan", str(path), "train.steps=30", "data.train.0.max_epochs=4"]) == 0
    assert main(["plan", str(path), "train.steps=30", "data.train.0.max_epochs=2"]) == 2
    assert f"times its {len(tokens):,}" in capsys.readouterr().err
