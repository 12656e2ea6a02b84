"""Stages that can't be: each mistake is a line with a fix, all of them at once, and doing what it says mends it."""

import re
from pathlib import Path

import pytest

from megatron_joy.errors import UserError
from megatron_joy.recipe import dump_recipe, load_recipe

BASE = "joyai_tiny_stages"

CASES = [
    (["train.steps=50"], "the stages have 12 + 12 + 12 + 12 = 48 updates (116,736 tokens)", "set train.steps = 48"),
    (["stages.1.steps=20"], "12 + 20 + 12 + 12 = 56", "set train.steps = 56"),
    (["stages.1.tokens=1000"], "stages.1.steps = 12: the stage has tokens = 1000 as well", "leave steps out"),
    (["stages.0.ramp_increment=12", "stages.0.ramp_from=4", "train.global_batch_size=24"], "from 4 to 24, 20", "= 12"),
    (
        ["stages.0.ramp_increment=2"],
        "stages.0.ramp_increment = 2: must be a multiple of",
        "stages.0.ramp_increment = 4",
    ),
    (["stages.0.ramp_from=10"], "stages.0.ramp_from = 10: must be a multiple of", "set stages.0.ramp_from = 12"),
    (["stages.0.ramp_from=16"], "must be below the stage's global batch of 16", "leave it out"),
    (["stages.1.ramp_increment=4"], "stages.1.ramp_increment = 4: has no effect without ramp_from", "leave it out"),
    (["stages.3.global_batch_size=6"], "stages.3.global_batch_size = 6: must be a multiple of", "= 8"),
    (
        ["stages.3.micro_batch_size=3", "stages.3.tokens=36864"],
        "global_batch_size = 8: must be a multiple of stages.3.micro_batch_size",
        "= 6",
    ),
    (
        ["stages.3.sequence_length=2048", "stages.3.tokens=98304"],
        "stages.3.sequence_length = 2048: must be at most",
        "sequence_length = 1024",
    ),
    (["stages.1.end_lr=1e-3"], "stages.1.end_lr = 0.001: has no effect with lr_shape", "cosine"),
    (["stages.1.lr_shape=linear"], "stages.1.end_lr: missing beside lr_shape", "set the rate"),
    (["stages.1.name=warmup"], "is already stages.0", "another name"),
    (["stages.2.blend.0.source=kode"], 'stages.2.blend.0.source = "kode": is no source', 'nearest is "code"'),
    (["stages.3.blend.0.weight=2"], "stages.3.blend.0.weight = 2.0: has no effect", "leave weight out"),
    (["data.train.1.weight=2"], "data.train.1.weight = 2.0: has no effect, every stage has a blend", "leave it out"),
    (["data.train.2.manifest=more"], "data.train.2 (more): has no effect, no stage's blend names it", "leave it out"),
    (["schedule.peak_lr=1e-3"], "schedule.peak_lr = 0.001: has no effect with [[stages]]", "leave it out"),
    (["stages.1.nam=x"], "stages.1.nam", "nearest known key is stages.1.name"),
    (["run.last_stage=decai"], 'run.last_stage = "decai": is no stage', "nearest is decay"),
    (["data.validation.0.name=x"], "data.validation.0.name", "leave it out"),
]


def refusal(overrides: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(BASE, overrides)
    return str(caught.value)


@pytest.mark.parametrize(("overrides", "rule", "fix"), CASES, ids=[case[0][-1] for case in CASES])
def test_a_broken_rule_is_one_line_with_rule_and_fix(overrides: list[str], rule: str, fix: str) -> None:
    message = refusal(overrides)
    assert rule in message
    assert fix in message
    assert "\n" not in message


@pytest.mark.parametrize("overrides", [case[0] for case in CASES[:11]], ids=[case[0][-1] for case in CASES[:11]])
def test_doing_what_the_line_says_mends_the_recipe(overrides: list[str]) -> None:
    advice = refusal(overrides).rpartition("; ")[2]
    if re.match(r"leave (it|steps) out", advice):
        return
    key, value = re.findall(r"([a-z_]+\.[a-z_.0-9]+) = ([0-9.e-]+)", advice)[-1]
    assert load_recipe(BASE, [*overrides, f"{key}={value}"]).stages


def test_all_mistakes_come_at_once() -> None:
    message = refusal(["stages.0.ramp_increment=2", "stages.2.blend.1.source=nope", "stages.1.end_lr=1e-3", "seed=-1"])
    for key in ("stages.0.ramp_increment", "stages.2.blend.1.source", "stages.1.end_lr", "seed"):
        assert key in message
    assert len(message.splitlines()) == 4


def test_a_first_stage_needs_a_rate_to_go_out_from(tmp_path: Path) -> None:
    path = tmp_path / "stages.toml"
    path.write_text('extends = "joyai_tiny"\n[[stages]]\nname = "only"\nsteps = 300\n')
    with pytest.raises(UserError, match=r"stages\.0\.start_lr: missing"):
        load_recipe(str(path))
    path.write_text(path.read_text() + "start_lr = 1e-3\n")
    assert load_recipe(str(path)).schedule.peak_lr == 4.2e-4  # joyai_tiny's own went quietly: it has no effect now


def test_a_common_key_that_every_stage_overrides_is_dead(tmp_path: Path) -> None:
    path = tmp_path / "stages.toml"
    path.write_text(
        'extends = "joyai_tiny"\n[train]\nvalidation_interval = 0\n'
        '[[stages]]\nname = "only"\nsteps = 300\nstart_lr = 1e-3\nsequence_length = 128\n'
    )
    with pytest.raises(UserError, match=r"data\.sequence_length = 256: has no effect.*leave it out of stages\.0"):
        load_recipe(str(path))


def test_without_an_mtp_layer_inherited_stages_say_nothing_of_it() -> None:
    recipe = load_recipe(BASE, ["model.num_nextn_predict_layers=0"])
    assert {stage.mtp_loss_factor for stage in recipe.stages} == {None}
    with pytest.raises(UserError, match=r"stages\.1\.mtp_loss_factor = 0\.2: has no effect"):
        load_recipe(BASE, ["model.num_nextn_predict_layers=0", "stages.1.mtp_loss_factor=0.2"])


def test_the_number_of_steps_is_told_where_it_is_missing_or_none(tmp_path: Path) -> None:
    said = "train.steps: the stages have 12 + 12 + 12 + 12 = 48 updates (116,736 tokens); set train.steps = 48"
    with pytest.raises(UserError) as none:
        load_recipe(BASE, ["train.steps=all"])
    assert str(none.value).splitlines()[1:] == [f"recipe {BASE}: {said}"]
    path = tmp_path / "mine.toml"
    text = dump_recipe(load_recipe(BASE))
    path.write_text(text.replace("[train]\nsteps = 48\n", "[train]\n"))
    with pytest.raises(UserError) as missing:
        load_recipe(str(path))
    first, second = str(missing.value).splitlines()
    assert first.startswith(f"recipe {path}: train.steps: missing")
    assert second == f"recipe {path}: {said}"
