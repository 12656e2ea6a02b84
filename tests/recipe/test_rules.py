"""Rules between keys: each refused with one line that names key, value, rule and one fix, and the fix works."""

import re

import pytest

from megatron_joy.errors import UserError
from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.validate import nearest_divisor, nearest_multiple

BASE = "joyai_tiny"
# One process without experts parallelism and batches that the shipped recipe may change: a case adds what it is about.
PLAIN = (
    "layout.data_parallel_size=1",
    "layout.expert_model_parallel_size=1",
    "train.global_batch_size=16",
    "train.micro_batch_size=8",
)
MANY = ("layout.data_parallel_size=64",)
INTERLEAVED = ("layout.pipeline_model_parallel_size=2", "layout.virtual_pipeline_model_parallel_size=2")
THREE = ("layout.data_parallel_size=3", "layout.expert_model_parallel_size=3")

CASES = [
    (["layout.tensor_model_parallel_size=3"], "must divide model.num_attention_heads = 4", "set layout.tensor"),
    (["layout.tensor_model_parallel_size=2", "model.vocab_size=8191"], "must divide model.vocab_size = 8191", "= 8192"),
    (["model.hidden_size=132"], "model.hidden_size = 132: must be a multiple of 8", "set model.hidden_size = 136"),
    (["model.moe_intermediate_size=99"], "must be a multiple of 8", "set model.moe_intermediate_size = 96"),
    (
        ["layout.tensor_model_parallel_size=2", "data.sequence_length=255", "train.micro_batch_size=1"],
        "data.sequence_length = 255",
        "set data.sequence_length = 256",
    ),
    (
        [
            "train.global_batch_size=64",
            "train.micro_batch_size=1",
            "train.validation_samples=64",
            *MANY,
            "layout.expert_tensor_parallel_size=64",
        ],
        "must divide model.moe_intermediate_size = 96",
        "size = 4",
    ),
    (["train.global_batch_size=24", "train.validation_samples=24", *THREE], "model.n_routed_experts = 8", "size = 1"),
    (["layout.expert_model_parallel_size=4"], "TP x CP x PP x DP = 1 x 1 x 1 x 1 = 1", "size = 1"),
    (["layout.expert_tensor_parallel_size=2"], "EP x ETP x PP = 1 x 2 x 1 = 2", "layout.data_parallel_size = 2"),
    (["model.num_experts_per_tok=9"], "at most model.n_routed_experts = 8", "set model.num_experts_per_tok = 8"),
    (["data.sequence_length=2048"], "at most model.max_position_embeddings = 1024", "set data.sequence_length = 1024"),
    (["model.qk_rope_head_dim=15"], "model.qk_rope_head_dim = 15", "set 16"),
    (["model.first_k_dense_replace=4"], "below model.num_hidden_layers = 4", "set model.first_k_dense_replace = 3"),
    (["layout.pipeline_model_parallel_size=3"], "PP x VPP = 3 x 1 = 3 equal", "pipeline_layer_counts = [2, 1, 1]"),
    (
        ["layout.pipeline_model_parallel_size=2", "layout.pipeline_layer_counts=[3, 2]"],
        "(found 2 adding up to 5)",
        "set layout.pipeline_layer_counts = [2, 2]",
    ),
    (["layout.pipeline_model_parallel_size=5"], "too few for PP x VPP = 5 x 1 = 5", "at most 4"),
    (["layout.context_parallel_size=3"], "multiple of 2 x CP = 2 x 3 = 6", "set data.sequence_length = 258"),
    (["train.global_batch_size=12"], "multiple of train.micro_batch_size x", "set train.global_batch_size = 16"),
    (
        [
            "layout.pipeline_model_parallel_size=2",
            "layout.virtual_pipeline_model_parallel_size=2",
            "train.global_batch_size=24",
        ],
        "3 micro-batches",
        "set train.global_batch_size = 32",
    ),
    (["train.steps=100"], "20 + 100 = 120: must be at most train.steps = 100", "set train.steps = 120"),
    (["schedule.final_lr=0.1"], "schedule.final_lr = 0.1: must be at most schedule.peak_lr = 0.003", "0.0003"),
    (["data.validation=[]"], "names no data to validate on", "train.validation_interval = 0"),
    (["train.validation_samples=30"], "train.validation_samples = 30", "set train.validation_samples = 32"),
    (
        [*INTERLEAVED, "train.validation_samples=24"],
        "train.validation_samples = 24: must be a multiple of train.micro_batch_size x layout.data_parallel_size x PP "
        "(with VPP 2)",
        "set train.validation_samples = 32",
    ),
    (
        ["checkpoint.interval=100", "checkpoint.keep_every=250"],
        "checkpoint.keep_every = 250: must be a multiple of checkpoint.interval = 100",
        "set checkpoint.keep_every = 300",
    ),
    (
        ["checkpoint.interval=50", "train.validation_interval=100", "checkpoint.keep_best=1"],
        "checkpoint.interval = 50: must be a multiple of train.validation_interval = 100",
        "set checkpoint.interval = 100",
    ),
    (["data.train.0.weight=2"], "data.train.0.weight = 2.0: has no effect", "leave weight out"),
    (["data.train.1.manifest=data/demo/train/"], "is already data.train.0", "weight = 2"),
]


def refusal(overrides: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(BASE, [*PLAIN, *overrides])
    return str(caught.value)


@pytest.mark.parametrize(("overrides", "rule", "fix"), CASES, ids=[case[0][-1] for case in CASES])
def test_a_broken_rule_is_one_line_with_rule_and_fix(overrides: list[str], rule: str, fix: str) -> None:
    message = refusal(overrides)
    assert message.startswith(f"recipe {BASE}: ")
    assert rule in message
    assert fix in message
    assert "\n" not in message


@pytest.mark.parametrize("overrides", [case[0] for case in CASES], ids=[case[0][-1] for case in CASES])
def test_doing_what_the_line_says_mends_the_recipe(overrides: list[str]) -> None:
    advice = refusal(overrides).rpartition("; ")[2]
    found = re.findall(r"([a-z_]+\.[a-z_.0-9]+) = (\[[0-9, ]+\]|[0-9.e-]+)", advice)
    if not found:
        # In words, for a person: "set 16", "leave weight out".
        assert re.match(r"(set|leave|keep) ", advice)
        return
    key, value = found[-1]
    assert load_recipe(BASE, [*PLAIN, *overrides, f"{key}={value}"]).name == BASE


MOOT = [
    (["model.num_nextn_predict_layers=0", "model.mtp_loss_factor=0.1"], "model.mtp_loss_factor = 0.1"),
    (["layout.virtual_pipeline_model_parallel_size=2"], "layout.virtual_pipeline_model_parallel_size = 2"),
    (["schedule.decay_steps=0", "schedule.decay_shape=linear"], 'schedule.decay_shape = "linear"'),
    (["schedule.decay_steps=0", "schedule.final_lr=1e-4"], "schedule.final_lr = 0.0001"),
    (["train.validation_interval=0", "train.validation_samples=8"], "train.validation_samples = 8"),
    (["checkpoint.interval=0", "checkpoint.asynchronous=true"], "checkpoint.asynchronous = true"),
    (["checkpoint.interval=0", "checkpoint.keep_every=5"], "checkpoint.keep_every = 5"),
    (["train.validation_interval=0", "checkpoint.keep_best=2"], "checkpoint.keep_best = 2"),
    (["train.validation_interval=0", "data.validation.0.manifest=x"], "data.validation = "),
]


@pytest.mark.parametrize(("overrides", "setting"), MOOT, ids=[case[1] for case in MOOT])
def test_a_setting_without_effect_is_refused_with_its_cause(overrides: list[str], setting: str) -> None:
    message = refusal(overrides)
    assert setting in message
    assert "has no effect with" in message
    assert message.endswith("leave it out")
    assert "\n" not in message


def test_an_inherited_setting_that_an_override_makes_moot_goes_quietly() -> None:
    # joyai_tiny sets final_lr, validation data and its samples; whoever turns the cause off needs no other key.
    recipe = load_recipe(BASE, ["schedule.decay_steps=0", "train.validation_interval=0"])
    assert recipe.data.validation == []
    assert recipe.train.validation_samples == 64  # the schema's default
    assert recipe.schedule.final_lr == 1.4e-4


def test_another_pipeline_takes_back_inherited_layer_counts() -> None:
    recipe = load_recipe(BASE, ["layout.pipeline_model_parallel_size=2"])
    assert recipe.layout.pipeline_layer_counts == [2, 2]


def test_what_follows_from_the_layout_is_derived() -> None:
    alone = load_recipe(BASE, PLAIN).layout
    assert (alone.pipeline_layer_counts, alone.world_size) == ([4], 1)
    wide = load_recipe(BASE, ["layout.tensor_model_parallel_size=2", "layout.pipeline_model_parallel_size=2"]).layout
    assert (wide.pipeline_layer_counts, wide.world_size, wide.expert_data_parallel_size) == ([2, 2], 8, 2)


def test_nearest_numbers_agree_with_a_search() -> None:
    for value in range(1, 40):
        for step in range(1, 15):
            best = min(range(step, 100, step), key=lambda number: (abs(number - value), -number))
            assert nearest_multiple(value, step) == best
            divisors = [number for number in range(1, step + 1) if step % number == 0]
            assert nearest_divisor(value, step) == min(divisors, key=lambda number: (abs(number - value), number))
