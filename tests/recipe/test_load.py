"""Loading: extends, overrides, and what each kind of bad recipe gets."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_joy.errors import UserError
from megatron_joy.recipe import dump_recipe, list_recipes, load_recipe

BASE = "joyai_tiny"
UNSET = ["data.tokenizer", "guards.ledger", "run.peak_tflops", "run.wandb_project", "run.profile_steps"]


def refusal(name: str, overrides: Sequence[str] = ()) -> str:
    """The message of a refused recipe."""
    with pytest.raises(UserError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", [recipe.name for recipe in list_recipes()])
def test_every_shipped_recipe_loads_and_is_called_like_its_file(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def test_the_real_recipe_has_the_dimensions_of_the_released_weights() -> None:
    model = load_recipe("joyai_48b_a3b").model
    # kv_b_proj of the released weights is (8192, 512), q_b_proj (6144, 1536), kv_a_proj_with_mqa (576, 2048).
    assert model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim) == 8192
    assert model.num_attention_heads * (model.qk_nope_head_dim + model.qk_rope_head_dim) == 6144
    assert model.kv_lora_rank + model.qk_rope_head_dim == 576
    assert (model.hidden_size, model.num_hidden_layers, model.n_routed_experts) == (2048, 40, 256)


def test_after_loading_only_these_may_be_none() -> None:
    for shipped in list_recipes():
        recipe = load_recipe(shipped.name)
        nones = [
            f"{name}.{key}"
            for name, section in recipe.model_dump().items()
            if isinstance(section, dict)
            for key, value in section.items()
            if value is None
        ]
        assert nones == UNSET


def test_a_file_extends_a_shipped_name_and_a_relative_path(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, "base.toml", f'extends = "{BASE}"\nseed = 7\n[train]\nsteps = 200\n')
    top = write(tmp_path / "deep", "top.toml", 'extends = "../base.toml"\nname = "top"\n[train]\nsteps = 500\n')
    recipe = load_recipe(top)
    assert (recipe.name, recipe.seed, recipe.train.steps) == ("top", 7, 500)
    assert recipe.run.folder == "runs/top"
    assert recipe.model == load_recipe(BASE).model


def test_a_cycle_of_extends_is_refused_with_the_chain(tmp_path: Path) -> None:
    first = write(tmp_path, "a.toml", 'extends = "b.toml"\n')
    write(tmp_path, "b.toml", 'extends = "./a.toml"\n')
    message = refusal(first)
    assert "extends itself" in message
    assert message.count("a.toml") >= 2
    assert "b.toml" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('extends = "joyai_tyny"\n', "the nearest shipped name is joyai_tiny"),
        ("extends = 3\n", "extends = 3: expects one name or path"),
        ("[train\n", "not TOML"),
        ("a = " + "[" * 5000, "nested too deeply"),
        ("train = 5\n", "train = 5: expects a table of keys"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_reason(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(write(tmp_path, "bad.toml", text))


def test_a_file_that_is_not_utf8_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(b'name = "caf\xe9"\n')
    message = refusal(str(path))
    assert "byte 11 is not UTF-8" in message
    assert "\n" not in message


def test_a_missing_file_and_a_folder_are_refused_in_one_line(tmp_path: Path) -> None:
    assert "no such file or shipped recipe" in refusal(str(tmp_path / "nowhere.toml"))
    assert "is a folder" in refusal(str(tmp_path))


def test_a_misspelt_key_is_one_line_with_key_value_and_nearest_key(tmp_path: Path) -> None:
    path = write(tmp_path, "typo.toml", f'extends = "{BASE}"\n[train]\nstepz = 3\n')
    assert refusal(path) == f"recipe {path}: train.stepz = 3: unknown key; the nearest known key is train.steps"


def test_a_misspelt_required_key_is_one_error_not_two(tmp_path: Path) -> None:
    text = dump_recipe(load_recipe(BASE)).replace("hidden_size", "hiden_size", 1)
    message = refusal(write(tmp_path, "typo.toml", text))
    assert message.endswith("model.hiden_size = 128: unknown key; the nearest known key is model.hidden_size")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("stepz=3", "train.steps"),
        ("steps=3", "train.steps"),
        ("train.seed=3", "seed"),
        ("data.train.0.manifst=x", "data.train.0.manifest"),
        ("modell.vocab_size=8", "model"),
        ("lr=1e-3", "schedule.peak_lr"),
        ("model.num_experts=8", "model.n_routed_experts"),
        ("train.seq_length=8", "data.sequence_length"),
        ("train.batch=8", "train.global_batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(override: str, nearest: str) -> None:
    message = refusal(BASE, [override])
    assert message.startswith("command line: ")
    assert message.endswith(f"unknown key; the nearest known key is {nearest}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.steps=0", "train.steps = 0: expects int > 0; set 1"),
        ("train.steps=1e3", "train.steps = 1000.0: expects int > 0; write 1000"),
        ('train.steps="70"', 'train.steps = "70": expects int > 0; write it without quotes, 70'),
        ("train.steps=true", "train.steps = true: expects int > 0; set 1"),
        ("precision.params_dtype=bf61", 'precision.params_dtype = "bf61": expects "fp32" or "bf16"; set "bf16"'),
        ("model.num_nextn_predict_layers=2", "model.num_nextn_predict_layers = 2: expects 0 or 1; set 0"),
        ("schedule.peak_lr=inf", "schedule.peak_lr = inf: expects float > 0; set 0.00042"),
        ("run.tensorboard=1", "run.tensorboard = 1: expects true or false; set true"),
        ("seed=-1", "seed = -1: expects int >= 0 and < 9223372036854775808; set 1234"),
        ("data.train=3", "data.train = 3: expects list of table; set []"),
        (
            "optimizer.betas=[0.9]",
            "optimizer.betas = [0.9]: expects 2 numbers, each float >= 0 and < 1; set [0.9, 0.95]",
        ),
        ("run.profile_steps=5", "run.profile_steps = 5: expects 2 numbers, each int > 0; set [1, 1]"),
        (
            "run.notify.webhook_env=http://x",
            'run.notify.webhook_env = "http://x": expects text matching ^[A-Za-z_][A-Za-z0-9_]*$; set "name"',
        ),
    ],
)
def test_a_wrong_value_names_key_value_rule_and_fix(override: str, line: str) -> None:
    assert refusal(BASE, [override]) == f"command line: {line}"


def test_a_missing_key_says_what_it_is(tmp_path: Path) -> None:
    text = dump_recipe(load_recipe(BASE)).replace("hidden_size = 128\n", "", 1)
    message = refusal(write(tmp_path, "short.toml", text))
    assert message.endswith("model.hidden_size: missing; give it a value (int > 0, Width of the residual stream.)")


def test_a_missing_section_tells_each_of_its_keys_and_nothing_else(tmp_path: Path) -> None:
    text = 'name = "x"\n[data]\nsequence_length = 8\n[train]\nsteps = 1\nglobal_batch_size = 1\n'
    lines = refusal(write(tmp_path, "short.toml", text)).splitlines()
    assert len(lines) == 1
    assert "model: missing" in lines[0]


def test_all_errors_are_told_at_once_single_keys_and_rules_between_keys() -> None:
    message = refusal(
        BASE, ["train.steps=abc", "model.nope=3", "layout.tensor_model_parallel_size=3", "data.sequence_length=2048"]
    )
    lines = message.splitlines()
    assert len(lines) == 4
    for key in ("train.steps", "model.nope", "layout.tensor_model_parallel_size = 3", "data.sequence_length = 2048"):
        assert sum(key in line for line in lines) == 1, key


def test_a_rule_is_not_asked_about_a_key_that_is_wrong_by_itself() -> None:
    assert "\n" not in refusal(BASE, ["train.global_batch_size=-5"])


def test_overrides_take_toml_values_bare_text_and_list_indices() -> None:
    recipe = load_recipe(
        BASE,
        [
            "schedule.peak_lr=1e-2",
            "run.folder=runs/2024-01-01",
            "data.train.0.manifest=somewhere/train",
            "data.train.1.manifest=12",
            "data.train.1.weight=3",
            "optimizer.betas=[0.8, 0.9]",
            "run.tensorboard=false",
            "description=a=b",
        ],
    )
    assert recipe.schedule.peak_lr == 0.01
    assert recipe.run.folder == "runs/2024-01-01"
    assert [(source.manifest, source.weight) for source in recipe.data.train] == [("somewhere/train", 1.0), ("12", 3.0)]
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.run.tensorboard is False
    assert recipe.description == "a=b"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "expects key.path=value"),
        ("=3", "expects key.path=value"),
        ("train..steps=3", "expects key.path=value"),
        ("data.train.5.manifest=x", "data.train has 1 entries; the index goes from 0 to 1"),
        ("data.train.x.manifest=x", "data.train has 1 entries; the index goes from 0 to 1"),
        ("train.steps.a=3", "train.steps is a single value"),
        ("optimizer.betas=[0.9", "the value is not TOML"),
        ("run.folder=\udcff", "is not UTF-8"),
    ],
)
def test_a_malformed_override_is_refused_in_one_line(override: str, expected: str) -> None:
    message = refusal(BASE, [override])
    assert message.startswith("override ")
    assert expected in message
    assert "\n" not in message


def test_loading_leaves_the_shipped_tables_alone() -> None:
    load_recipe(BASE, ["data.train.0.manifest=elsewhere"])
    assert load_recipe(BASE).data.train[0].manifest == "data/demo/train"
