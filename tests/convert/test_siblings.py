"""A sibling model is a table: the one that docs/conversion.md shows is complete for DeepSeek-V3 and loses no bit."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from megatron_joy.convert import mapping
from megatron_joy.convert.hf_config import SHARED_KEYS
from megatron_joy.convert.mapping import ConversionPlan, MappingTable, check_parameters, check_tensors, conversion_plan
from megatron_joy.recipe.schema import ModelSection

PAGE = Path(__file__).parents[2] / "docs" / "conversion.md"
SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "intermediate_size": 56,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
}


@pytest.fixture(scope="module")
def table() -> MappingTable:
    """The example on the page, run as a reader would."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    found: MappingTable = names["DEEPSEEK_V3"]
    return found


def section(config: DeepseekV3Config, mtp: int) -> ModelSection:
    """What decides shapes."""
    keys = set(SHARED_KEYS) - {"rope_theta", "num_nextn_predict_layers"}
    return ModelSection(**{key: getattr(config, key) for key in keys}, num_nextn_predict_layers=mtp)


def test_the_released_model_has_as_many_numbers_as_transformers_builds(table: MappingTable) -> None:
    config = DeepseekV3Config()  # the released one's widths are the defaults
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    plan = conversion_plan(section(config, 0), table)
    biases = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))
    assert sum(t.elements for t in plan.tensors) == sum(p.numel() for p in model.parameters()) + biases
    assert round(sum(t.elements for t in plan.tensors) / 1e9) == 671  # arXiv 2412.19437
    predictor = [t for t in conversion_plan(section(config, 1), table).tensors if t.name.startswith("model.layers.61.")]
    # One decoder layer with experts, its router's bias, three norms and the projection of two hidden states to one.
    layer = sum(p.numel() for p in model.model.layers[-1].parameters()) + config.n_routed_experts
    own = layer + 3 * config.hidden_size + 2 * config.hidden_size**2
    assert sum(t.elements for t in predictor if t.copy_of is None) == own
    assert {t.name.removeprefix("model.layers.61.") for t in predictor if t.copy_of} == {
        "embed_tokens.weight",
        "shared_head.head.weight",
    }


def hugging_face(folder: Path) -> dict[str, Tensor]:
    """A minuscule DeepSeek-V3 as transformers saves it, and its MTP layer: a decoder layer of its own class, framed."""
    torch.manual_seed(3)
    config = DeepseekV3Config(**SMALL, tie_word_embeddings=False)
    main = DeepseekV3ForCausalLM(config)
    longer = DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL | {"num_hidden_layers": 4}, tie_word_embeddings=False))
    for name, model in (("main", main), ("longer", longer)):
        for tensor in [*model.parameters(), *model.buffers()]:
            torch.nn.init.normal_(tensor)
        model.save_pretrained(folder / name)
    tensors = load_file(folder / "main" / "model.safetensors")
    layer = "model.layers.3."
    tensors |= {n: t for n, t in load_file(folder / "longer" / "model.safetensors").items() if n.startswith(layer)}
    hidden = SMALL["hidden_size"]
    tensors |= {layer + f"{name}.weight": torch.randn(hidden) for name in ("enorm", "hnorm", "shared_head.norm")}
    tensors[layer + "eh_proj.weight"] = torch.randn(hidden, 2 * hidden)
    tensors[layer + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[layer + "shared_head.head.weight"] = tensors["lm_head.weight"]
    return tensors


def megatron(plan: ConversionPlan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that the plan makes of the tensors; NaN where it puts nothing."""
    parameters = {key: torch.full(shape, math.nan) for key, shape in plan.parameters.items()}
    for tensor in plan.tensors:
        box = tuple(slice(a, a + n) for a, n in zip(tensor.start, tensor.size, strict=True))
        if tensor.copy_of is None:
            assert torch.isnan(parameters[tensor.key][box]).all(), tensor.name
            parameters[tensor.key][box] = tensors[tensor.name].view(tensor.size)
    return parameters


def test_transformers_model_goes_through_the_table_and_back_bit_for_bit(table: MappingTable, tmp_path: Path) -> None:
    tensors = hugging_face(tmp_path)
    plan = conversion_plan(section(DeepseekV3Config(**SMALL), 1), table)
    check_tensors(plan, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, "transformers")
    assert tensors.keys() == plan.by_name.keys()
    parameters = megatron(plan, tensors)
    check_parameters(plan, {key: tuple(tensor.shape) for key, tensor in parameters.items()}, "megatron")
    assert not any(torch.isnan(tensor).any() for tensor in parameters.values())
    for name, tensor in plan.by_name.items():
        box = tuple(slice(a, a + n) for a, n in zip(tensor.start, tensor.size, strict=True))
        assert torch.equal(parameters[tensor.key][box].view(tensor.shape), tensors[name]), name


def test_the_two_tables_differ_in_the_mtp_layer_alone(table: MappingTable) -> None:
    model = section(DeepseekV3Config(**SMALL), 1)
    ours, theirs = conversion_plan(model, mapping.JOYAI), conversion_plan(model, table)
    differing = ours.by_name.keys() ^ theirs.by_name.keys()
    assert differing
    assert all(name.startswith("model.layers.3.") for name in differing)
    assert "model.layers.3.mlp.gate.e_score_correction_bias" in theirs.by_name.keys() - ours.by_name.keys()
