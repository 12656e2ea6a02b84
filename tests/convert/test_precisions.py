"""Each precision: the error of rounding to the nearest, what is left out, and what others read of it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from transformers import AutoModelForCausalLM

from megatron_joy.checkpoint.find import open_checkpoint
from megatron_joy.convert import verify
from megatron_joy.convert.export_job import ExportOptions
from megatron_joy.convert.from_hf import from_hf
from megatron_joy.convert.logits import transformers_logits
from megatron_joy.convert.mapping import conversion_plan
from megatron_joy.convert.precisions.config import quantization_config
from megatron_joy.convert.precisions.independent import independent
from megatron_joy.convert.precisions.schemes import pack_nibbles, spread, unpack_nibbles
from megatron_joy.convert.precisions.table import PRECISIONS, left_out
from megatron_joy.convert.store import TensorStore
from megatron_joy.convert.to_hf import to_hf
from megatron_joy.errors import UserError, WorkError
from megatron_joy.recipe import load_recipe
from tests.convert.tampering import all_tensors, edit_json, edit_tensors
from tests.convert.worlds import Reference, make_reference
from tests.gloo import run_world

QUANTISED = [name for name, row in PRECISIONS.items() if row.scheme is not None]
# Widths that groups of 32 and of 128 divide.
WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("wide")
    run_world(make_reference, 1, folder, "bf16", WIDE)
    return Reference(folder)


@pytest.fixture(scope="module")
def folders(wide: Reference, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every quantised precision, bits and errors verified, logits not compared."""
    out = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "memory_problem", lambda plan: "not here")
        for name in QUANTISED:
            to_hf(wide.checkpoint, out / name, ExportOptions(precision=name))
    return {name: out / name for name in QUANTISED}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_dequantised_number_is_within_half_a_step_and_others_read_the_same(name: str) -> None:
    row = PRECISIONS[name]
    assert row.scheme is not None
    weight = torch.randn((200 if name.startswith("int8") else 128, 256), generator=torch.Generator().manual_seed(1))
    weight[:, :128] *= 100
    weight[3, :128] = 0
    stored = row.scheme.quantise(weight)
    found = row.scheme.dequantise(stored)
    assert torch.equal(found, independent(row, row.scheme)[0](stored))
    scales = spread(stored[row.scheme.scale].float(), tuple(weight.shape), row.scheme.tile)
    assert bool(((found - weight).abs() <= row.scheme.half_step(weight, scales) + 1e-6 * weight.abs()).all())
    assert not found[3, :128].any()


def test_int4_numbers_are_packed_eight_to_a_word_the_first_lowest() -> None:
    values = torch.tensor([[-8, -7, 0, 1, 2, 3, 6, 7]], dtype=torch.int8)
    packed = pack_nibbles(values)
    assert packed.item() & 0xFFFFFFFF == sum((int(v) + 8) << 4 * i for i, v in enumerate(values[0]))
    assert torch.equal(unpack_nibbles(packed), values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(bad: float) -> None:
    for name in QUANTISED:
        scheme = PRECISIONS[name].scheme
        assert scheme is not None
        with pytest.raises(ValueError, match="infinite or no numbers"):
            scheme.quantise(torch.full((128, 128), bad))


@pytest.mark.parametrize("name", QUANTISED)
def test_nearly_all_of_the_48b_is_quantised_and_the_rest_has_reasons(name: str) -> None:
    plan = conversion_plan(load_recipe("joyai_48b_a3b").model)
    kept = left_out(plan, PRECISIONS[name])
    share = sum(plan.by_name[tensor].elements for tensor in kept) / sum(t.elements for t in plan.tensors)
    assert share < 0.03
    assert all(kept.values())
    for left in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.gate.weight"):
        assert left in kept
    for quantised in ("model.layers.39.mlp.experts.255.down_proj.weight", "model.layers.40.mlp.up_proj.weight"):
        assert quantised not in kept
    # Half of what engines join into one matrix must not be quantised alone.
    attention = "model.layers.7.self_attn."
    assert (attention + "q_a_proj.weight" in kept) == (attention + "kv_a_proj_with_mqa.weight" in kept)


@pytest.mark.parametrize("name", ["int8-channel", "int4", "int4-fp8"])
def test_compressed_tensors_own_schema_takes_the_configuration(name: str) -> None:
    config = quantization_config(PRECISIONS[name], ["lm_head.weight"])
    assert config is not None
    read = QuantizationConfig.model_validate(config)
    assert read.ignore == ["lm_head"]
    assert (read.config_groups["group_0"].input_activations is None) == (name == "int4")


@pytest.mark.parametrize("name", QUANTISED)
def test_the_folder_tells_what_was_quantised_and_each_error(name: str, folders: dict[str, Path]) -> None:
    told = json.loads((folders[name] / "joy_conversion.json").read_text())
    assert set(told["quantised"]) == told["verification"]["errors"].keys()
    assert told["quantised"]
    assert not set(told["quantised"]) & told["not_quantised"].keys()
    largest = {"fp8": 0.04, "int8": 0.02, "int8-channel": 0.02, "int4": 0.12, "int4-fp8": 0.14}[name]
    assert all(0 < error["relative"] < largest for error in told["verification"]["errors"].values())


@pytest.mark.parametrize("name", QUANTISED)
def test_transformers_loads_it_on_a_cpu_near_the_training_models_logits(
    name: str, folders: dict[str, Path], wide: Reference
) -> None:
    ids, expected = wide.outputs["ids"], wide.outputs["logits"]
    if name.startswith("int8"):  # transformers does not know the one, nor experts in the other
        logits = transformers_logits(folders[name], ids)
    else:
        model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32, local_files_only=True)
        with torch.no_grad():
            logits = model.eval()(ids).logits
    difference = float((logits - expected).norm() / expected.norm())
    limit = {"fp8": 0.3, "int8": 0.2, "int8-channel": 0.2, "int4": 0.6, "int4-fp8": 0.6}[name]
    assert 1e-4 < difference < limit


@pytest.mark.parametrize("name", QUANTISED)
def test_it_can_be_imported_and_is_dequantised_on_the_way(
    name: str, folders: dict[str, Path], wide: Reference, tmp_path: Path
) -> None:
    assert from_hf(folders[name], tmp_path / "ckpt").precision == "bf16"
    errors = json.loads((folders[name] / "joy_conversion.json").read_text())["verification"]["errors"]
    with TensorStore(open_checkpoint(tmp_path / "ckpt")) as store:
        for key in ("decoder.layers.3.mlp.experts.experts.linear_fc2.weight", "decoder.final_norm.weight"):
            before, after = wide.weights[key].float(), store.read(key).float()
            worst = max(error["relative"] for error in errors.values()) + 0.01
            assert (after - before).norm() <= (worst if "fc2" in key else 0) * before.norm()


def test_a_weight_without_its_scale_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["fp8"], tmp_path / "hf")
    edit_tensors(folder, "mtp-1-of-1.safetensors", {"model.layers.2.mlp.up_proj.weight_scale_inv": None})
    with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.up_proj\.weight is float8_e4m3fn and has no weight_"):
        from_hf(folder, tmp_path / "ckpt")
    edit_tensors(folder, "mtp-1-of-1.safetensors", {"model.layers.2.mlp.up_proj.weight_scale_inv": torch.ones(3, 3)})
    with pytest.raises(
        UserError, match=r"up_proj\.weight_scale_inv is torch\.float32 \[3, 3\], expected fp32 \[2, 1\]"
    ):
        from_hf(folder, tmp_path / "ckpt")
    edit_json(folder / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(UserError, match=r"weights are quantised \(awq\); expected fp8"):
        from_hf(folder, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_an_element_too_far_away_is_found(folders: dict[str, Path], wide: Reference) -> None:
    scheme = PRECISIONS["fp8"].scheme
    assert scheme is not None
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    tensors = all_tensors(folders["fp8"])
    stored = {"weight": tensors[name], "weight_scale_inv": tensors[f"{name}_scale_inv"]}
    other = tensors["model.layers.1.mlp.experts.1.up_proj.weight"].float()
    with pytest.raises(WorkError, match="further from the checkpoint's than rounding explains"):
        verify.error_of(name, other, scheme.dequantise(stored), stored, dataclasses.replace(scheme))


@pytest.mark.parametrize("name", ["fp8"])
def test_the_logits_distance_from_bf16_is_told(name: str, wide: Reference, tmp_path: Path) -> None:
    done = to_hf(wide.checkpoint, tmp_path / "hf", ExportOptions(precision=name))
    assert done.verification is not None
    logits = done.verification.logits
    assert logits is not None
    assert 0 < logits.kl < 1
    assert 0.5 < logits.top1_agreement <= 1
    assert 0.5 < logits.perplexity_ratio < 2
    assert any("of the numbers were not quantised" in note for note in done.notes)
