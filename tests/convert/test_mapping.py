"""The table is total: it names every tensor of the released model, and nothing twice, left out or misshapen."""

import dataclasses
import math

import pytest

from megatron_joy.convert.mapping import (
    DENSE,
    JOYAI,
    Block,
    ConversionPlan,
    Row,
    check_parameters,
    check_tensors,
    conversion_plan,
)
from megatron_joy.errors import UserError
from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.schema import ModelSection
from tests.convert.worlds import MODEL


@pytest.fixture(scope="module")
def plan() -> ConversionPlan:
    return conversion_plan(ModelSection(**MODEL))


@pytest.fixture(scope="module")
def flash() -> ConversionPlan:
    return conversion_plan(load_recipe("joyai_48b_a3b").model)


def test_the_released_model_has_the_tensors_and_parameters_of_the_paper(flash: ConversionPlan) -> None:
    main = [tensor for tensor in flash.tensors if tensor.file == "model"]
    assert len(main) == 30_513
    assert sum(tensor.elements for tensor in main) == 48_942_542_592
    predictor = [tensor for tensor in flash.tensors if tensor.file == "mtp" and tensor.copy_of is None]
    assert sum(tensor.elements for tensor in predictor) == 78_786_560


# Names and shapes that others read off the released files (facts: xLLM, vLLM, SGLang's tests on the real MTP shard).
RELEASED = {
    "model.embed_tokens.weight": (129280, 2048),
    "lm_head.weight": (129280, 2048),
    "model.norm.weight": (2048,),
    "model.layers.39.input_layernorm.weight": (2048,),
    "model.layers.39.post_attention_layernorm.weight": (2048,),
    "model.layers.7.self_attn.q_a_proj.weight": (1536, 2048),
    "model.layers.7.self_attn.q_a_layernorm.weight": (1536,),
    "model.layers.7.self_attn.q_b_proj.weight": (6144, 1536),
    "model.layers.7.self_attn.kv_a_proj_with_mqa.weight": (576, 2048),
    "model.layers.7.self_attn.kv_a_layernorm.weight": (512,),
    "model.layers.7.self_attn.kv_b_proj.weight": (8192, 512),
    "model.layers.7.self_attn.o_proj.weight": (2048, 4096),
    "model.layers.0.mlp.gate_proj.weight": (7168, 2048),
    "model.layers.0.mlp.down_proj.weight": (2048, 7168),
    "model.layers.1.mlp.gate.weight": (256, 2048),
    "model.layers.1.mlp.gate.e_score_correction_bias": (256,),
    "model.layers.39.mlp.experts.255.up_proj.weight": (768, 2048),
    "model.layers.39.mlp.experts.255.down_proj.weight": (2048, 768),
    "model.layers.39.mlp.shared_experts.gate_proj.weight": (768, 2048),
    "model.layers.40.enorm.weight": (2048,),
    "model.layers.40.eh_proj.weight": (2048, 4096),
    "model.layers.40.mlp.gate_proj.weight": (7168, 2048),
    "model.layers.40.shared_head.norm.weight": (2048,),
    "model.layers.40.shared_head.head.weight": (129280, 2048),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_names_have_the_released_shapes(flash: ConversionPlan, name: str) -> None:
    assert flash.by_name[name].shape == RELEASED[name]


def test_the_released_model_has_no_name_beside_the_known_ones(flash: ConversionPlan) -> None:
    assert "model.layers.0.mlp.gate.weight" not in flash.by_name
    assert "model.layers.40.mlp.gate.weight" not in flash.by_name
    assert "model.layers.40.embed_tokens.weight" not in flash.by_name
    assert "model.layers.41.enorm.weight" not in flash.by_name


def test_every_element_of_every_parameter_is_in_exactly_one_tensor(plan: ConversionPlan) -> None:
    for key, shape in plan.parameters.items():
        seen: set[tuple[int, ...]] = set()
        for tensor in plan.by_key[key]:
            assert math.prod(tensor.size) == math.prod(tensor.shape)
            box = [range(a, a + n) for a, n in zip(tensor.start, tensor.size, strict=True)]
            rows = {(i, j) for i in box[0] for j in (box[1] if len(box) == 3 else [0])}
            assert not rows & seen
            seen |= rows
        assert len(seen) == shape[0] * (shape[1] if len(shape) == 3 else 1)


def test_gate_comes_before_up_and_experts_are_counted_by_the_first_dimension(plan: ConversionPlan) -> None:
    gate = plan.by_name["model.layers.2.mlp.experts.5.gate_proj.weight"]
    up = plan.by_name["model.layers.2.mlp.experts.5.up_proj.weight"]
    assert gate.key == up.key == "decoder.layers.5.mlp.experts.experts.linear_fc1.weight"
    assert (gate.start, up.start) == ((5, 0, 0), (5, 32, 0))
    assert gate.shape == up.shape == (32, 40)


def test_only_router_biases_keep_fp32_in_every_precision(plan: ConversionPlan) -> None:
    kept = [tensor.name for tensor in plan.tensors if tensor.kind == "fp32"]
    assert kept == [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2, 3)]


def test_a_model_without_mtp_has_no_tensor_of_it() -> None:
    plan = conversion_plan(ModelSection(**MODEL | {"num_nextn_predict_layers": 0}))
    assert not [tensor for tensor in plan.tensors if tensor.file == "mtp"]
    assert not [key for key in plan.parameters if key.startswith("mtp.")]


def test_padding_rows_of_the_vocabulary_belong_to_no_tensor() -> None:
    plan = conversion_plan(ModelSection(**MODEL), vocabulary=90)
    assert plan.by_name["model.embed_tokens.weight"].shape == (90, 40)
    assert plan.by_name["model.layers.4.shared_head.head.weight"].shape == (90, 40)
    assert plan.parameters["output_layer.weight"] == (98, 40)


@pytest.mark.parametrize("rows", [0, 99])
def test_a_vocabulary_that_does_not_fit_is_refused(rows: int) -> None:
    with pytest.raises(UserError, match=rf"vocab_size {rows} does not fit model.vocab_size 98"):
        conversion_plan(ModelSection(**MODEL), vocabulary=rows)


def test_a_table_that_forgets_a_part_of_a_parameter_is_a_bug_that_is_found() -> None:
    only_gate = Row("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.gate_proj.weight"), ("2 dense", "hidden"))
    blocks = [
        dataclasses.replace(block, rows=(DENSE[0], only_gate, DENSE[2])) if block.rows is DENSE else block
        for block in JOYAI.blocks
    ]
    with pytest.raises(ValueError, match="a Hugging Face name twice"):
        conversion_plan(ModelSection(**MODEL), dataclasses.replace(JOYAI, blocks=tuple(blocks)))


def test_a_table_whose_parts_do_not_divide_the_rows_is_found() -> None:
    odd = Row("odd", ("a", "b", "c"), ("hidden",))
    table = dataclasses.replace(JOYAI, blocks=(Block("once", "", "", (odd,)),), copies=())
    with pytest.raises(ValueError, match="covers 39 of 40 elements of odd"):
        conversion_plan(ModelSection(**MODEL), table)


def test_a_dropped_key_is_named(plan: ConversionPlan) -> None:
    found = dict(plan.parameters)
    del found["decoder.layers.3.mlp.router.expert_bias"]
    with pytest.raises(UserError, match=r"ckpt: lacks decoder\.layers\.3\.mlp\.router\.expert_bias;"):
        check_parameters(plan, found, "ckpt")


def test_an_extra_key_is_named(plan: ConversionPlan) -> None:
    with pytest.raises(UserError, match=r"has decoder\.layers\.8\.mlp\.weight, which the model has no place for"):
        check_parameters(plan, plan.parameters | {"decoder.layers.8.mlp.weight": (1,)}, "ckpt")


def test_a_wrong_shape_is_named_with_both_shapes(plan: ConversionPlan) -> None:
    found = plan.parameters | {"mtp.layers.0.eh_proj.weight": (80, 40)}
    with pytest.raises(UserError, match=r"mtp\.layers\.0\.eh_proj\.weight is \[80, 40\], expected \[40, 80\]"):
        check_parameters(plan, found, "ckpt")


def test_all_that_is_wrong_is_said_in_one_line(plan: ConversionPlan) -> None:
    found = {tensor.name: tensor.shape for tensor in plan.tensors if ".experts." not in tensor.name}
    found["model.norm.weight"] = (41,)
    found["surprise"] = (1,)
    with pytest.raises(UserError) as caught:
        check_tensors(plan, found, "hf")
    assert "\n" not in str(caught.value)
    assert "and 51 more; has surprise" in str(caught.value)
    assert "model.norm.weight is [41], expected [40]" in str(caught.value)


def test_a_copy_of_the_head_may_be_absent(plan: ConversionPlan) -> None:
    check_tensors(plan, {tensor.name: tensor.shape for tensor in plan.tensors if tensor.copy_of is None}, "hf")
