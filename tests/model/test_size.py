"""Parameter counts are exact: against the published model's arithmetic and a closed form of our own."""

import json
import random

import pytest
import torch

from megatron_joy.cli.main import main
from megatron_joy.model.size import KINDS, _kind, parameter_counts
from megatron_joy.platform.process import start
from megatron_joy.recipe import list_recipes, load_recipe
from megatron_joy.recipe.schema import DataSection, LayoutSection, ModelSection, Recipe, TrainSection
from tests.gloo import run_world

CLOSED_FORM_KINDS = ("MLA", "dense MLP", "routed experts", "shared experts", "router", "router bias", "norms")


def closed_form(m: ModelSection) -> dict[str, int]:
    """Counts of the main model by kind, from the shapes of the released weights."""
    heads = m.num_attention_heads
    attention = (
        m.hidden_size * m.q_lora_rank
        + m.q_lora_rank
        + m.q_lora_rank * heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
        + m.hidden_size * (m.kv_lora_rank + m.qk_rope_head_dim)
        + m.kv_lora_rank
        + m.kv_lora_rank * heads * (m.qk_nope_head_dim + m.v_head_dim)
        + heads * m.v_head_dim * m.hidden_size
    )
    sparse = m.num_hidden_layers - m.first_k_dense_replace
    expert = 3 * m.hidden_size * m.moe_intermediate_size
    return {
        "embedding": m.vocab_size * m.hidden_size,
        "head": m.vocab_size * m.hidden_size,
        "MLA": m.num_hidden_layers * attention,
        "router": sparse * m.n_routed_experts * m.hidden_size,
        "router bias": sparse * m.n_routed_experts,
        "routed experts": sparse * m.n_routed_experts * expert,
        "shared experts": sparse * m.n_shared_experts * expert,
        "dense MLP": m.first_k_dense_replace * 3 * m.hidden_size * m.intermediate_size,
        "norms": (2 * m.num_hidden_layers + 1) * m.hidden_size,
        "one MLA": attention,
    }


def mtp_closed_form(m: ModelSection) -> int:
    """eh_proj, three norms, and one decoder layer with a dense MLP."""
    layer = closed_form(m)["one MLA"] + 2 * m.hidden_size + 3 * m.hidden_size * m.intermediate_size
    return m.num_nextn_predict_layers * (2 * m.hidden_size**2 + 3 * m.hidden_size + layer)


def random_recipe(seed: int) -> Recipe:
    """Widths drawn without any wish for round numbers, and a layout that the count must not depend on."""
    draw = random.Random(seed)
    experts = draw.choice([2, 4, 6, 10])
    model = ModelSection(
        vocab_size=draw.randrange(50, 400),
        hidden_size=8 * draw.randrange(2, 9),
        num_hidden_layers=(layers := draw.randrange(2, 7)),
        first_k_dense_replace=draw.randrange(0, layers),
        num_attention_heads=draw.choice([1, 2, 5]),
        q_lora_rank=draw.randrange(3, 40),
        kv_lora_rank=draw.randrange(3, 40),
        qk_nope_head_dim=draw.randrange(3, 30),
        qk_rope_head_dim=2 * draw.randrange(1, 9),
        v_head_dim=draw.randrange(3, 30),
        intermediate_size=draw.randrange(10, 90),
        moe_intermediate_size=draw.randrange(5, 40),
        n_routed_experts=experts,
        num_experts_per_tok=draw.randrange(1, experts + 1),
        n_shared_experts=draw.choice([1, 2, 3]),
        num_nextn_predict_layers=draw.choice([0, 1]),
    )
    layout = LayoutSection(expert_model_parallel_size=2, data_parallel_size=2)
    train = TrainSection(steps=1, global_batch_size=2, recompute="full")
    return Recipe(name="random", model=model, layout=layout, data=DataSection(sequence_length=16), train=train)


RECIPES = {r.name: load_recipe(r.name) for r in list_recipes()} | {f"random_{i}": random_recipe(i) for i in range(6)}


@pytest.mark.parametrize("name", RECIPES)
def test_counts_are_those_of_the_closed_form(name: str) -> None:
    model = RECIPES[name].model
    counts, expected = parameter_counts(RECIPES[name]), closed_form(model)
    expected.pop("one MLA")
    assert {kind: total for kind, total, _ in counts.rows} == {kind: n for kind, n in expected.items() if n}
    assert counts.mtp == mtp_closed_form(model)
    used = dict(expected) | {
        "routed experts": expected["routed experts"] // model.n_routed_experts * model.num_experts_per_tok
    }
    assert {kind: active for kind, _, active in counts.rows} == {kind: n for kind, n in used.items() if n}
    assert counts.active == sum(used.values())


def test_the_48b_has_exactly_the_published_numbers() -> None:
    counts = parameter_counts(RECIPES["joyai_48b_a3b"])
    assert counts.total == 48_942_542_592
    assert counts.mtp == 78_786_560
    assert counts.as_json()["total_with_mtp"] == 49_021_329_152
    assert counts.readings["without embedding and head"] == 2_774_789_888
    assert counts.readings["with head"] == 3_039_555_328
    assert counts.readings["with embedding and head"] == counts.active == 3_304_320_768
    assert round(counts.readings["without routers"] / 1e9, 3) == 3.284
    assert round(counts.readings["without all three"] / 1e9, 3) == 2.754


def test_a_parameter_of_no_known_kind_is_an_error_that_names_it() -> None:
    with pytest.raises(RuntimeError, match=r"decoder\.layers\.0\.new_gate"):
        _kind("decoder.layers.0.new_gate.scale")
    assert _kind("decoder.layers.3.mlp.shared_experts.linear_fc1.weight") == "shared experts"
    assert {kind for _, kind in KINDS} >= set(CLOSED_FORM_KINDS)


def _count_in_a_world_of_two() -> str:
    start(LayoutSection(data_parallel_size=2), seed=1)
    try:
        parameter_counts(RECIPES["joyai_tiny"])
    except RuntimeError as error:
        return str(error)
    return "counted"


def test_counting_leaves_no_process_group_behind_and_refuses_to_replace_others() -> None:
    parameter_counts(RECIPES["joyai_tiny"])
    assert not torch.distributed.is_initialized()
    assert all("has joined a world" in said for said in run_world(_count_in_a_world_of_two, 2))


def test_the_command_tells_kinds_sums_and_readings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", "joyai_48b_a3b", "--size", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["total"], told["mtp"], told["active"]) == (48_942_542_592, 78_786_560, 3_304_320_768)
    assert {"kind": "router bias", "total": 9_984, "active": 9_984} in told["kinds"]
    assert main(["recipe", "show", "joyai_48b_a3b", "--size"]) == 0
    shown = capsys.readouterr().out
    assert "48,942,542,592" in shown and "78,786,560" in shown and "2,774,789,888" in shown
