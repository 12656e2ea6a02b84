"""A ladder's recipes are valid and keep its rules; what makes no ladder is refused and nothing is written."""

import json
import math
from pathlib import Path

import pytest

from megatron_joy.cli.main import main
from megatron_joy.recipe import load_recipe

ONE = ("layout.expert_model_parallel_size=1", "layout.data_parallel_size=1")


def sweep(out: Path, *arguments: str) -> int:
    return main(["recipe", "sweep", "joyai_tiny", *ONE, "--out", str(out), *arguments])


def test_a_ladder_keeps_its_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = ("--widths", "256,64,128", "--tokens-per-parameter", "2", "--lr-exponent", "-0.5", "--json")
    assert sweep(tmp_path / "ladder", *rules) == 0
    rows, base = json.loads(capsys.readouterr().out), load_recipe("joyai_tiny", ONE)
    assert [row["hidden_size"] for row in rows] == [64, 128, 256]
    for row in rows:
        made = load_recipe(row["file"])
        width, ratio = made.model.hidden_size, made.model.hidden_size / base.model.hidden_size
        assert made.name == f"joyai_tiny_w{width}" and made.run.folder == f"runs/{made.name}"
        assert made.model.num_hidden_layers == 4 * ratio
        assert made.model.num_attention_heads == 4 * ratio
        assert made.model.moe_intermediate_size == 96 * ratio
        assert (made.model.qk_nope_head_dim, made.model.n_routed_experts) == (32, 8)
        assert made.schedule.peak_lr == pytest.approx(3e-3 * ratio**-0.5)
        assert made.schedule.final_lr == pytest.approx(3e-4 * ratio**-0.5)
        tokens = made.train.steps * 8 * 256
        assert tokens == row["tokens"]
        assert made.train.steps == math.ceil(2 * row["active_parameters"] / (8 * 256))
        assert made.schedule.decay_steps == made.train.steps * 100 // 300
    assert rows[0]["flops"] < rows[1]["flops"] < rows[2]["flops"]


def test_uneven_layers_are_dealt_to_the_stages(tmp_path: Path) -> None:
    two = ("layout.pipeline_model_parallel_size=2",)
    assert main(["recipe", "sweep", "joyai_tiny", *ONE, *two, "--out", str(tmp_path), "--widths", "160"]) == 0
    made = load_recipe(str(tmp_path / "joyai_tiny_w160.toml"))
    assert (made.model.num_hidden_layers, made.layout.pipeline_layer_counts) == (5, [3, 2])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--widths", "100,128"), "must be different multiples of 16; try --widths 96,128"),
        (("--widths", "64,64"), "must be different multiples of 16"),
        (("--widths", "64,abc"), "expected whole numbers with commas between them"),
        ((), "must be different multiples of 16"),
        (("--widths", "64", "run.folder=runs/mine"), "all models would train there"),
        (("--widths", "96", "layout.tensor_model_parallel_size=4"), "must divide model.num_attention_heads = 3"),
    ],
)
def test_what_makes_no_ladder_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "ladder", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "ladder").exists()


def test_a_recipe_with_stages_is_refused_and_another_file_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", "sweep", "joyai_tiny_stages", "--out", str(tmp_path), "--widths", "64"]) == 2
    assert "a ladder has one schedule" in capsys.readouterr().err
    (tmp_path / "joyai_tiny_w64.toml").write_text("mine")
    assert sweep(tmp_path, "--widths", "64") == 2
    assert "exists and is another recipe" in capsys.readouterr().err
    assert (tmp_path / "joyai_tiny_w64.toml").read_text() == "mine"
