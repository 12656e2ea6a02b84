"""An import gives back the same bits; whatever is wrong with a folder is one line, and nothing is written."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megatron_joy.checkpoint.find import open_checkpoint
from megatron_joy.convert.export_job import ExportOptions
from megatron_joy.convert.from_hf import from_hf
from megatron_joy.convert.import_job import ImportJob, Part
from megatron_joy.convert.store import TensorStore
from megatron_joy.convert.to_hf import to_hf
from megatron_joy.errors import UserError
from megatron_joy.recipe import dump_recipe, load_recipe
from tests.convert.tampering import all_tensors, edit_json, edit_tensors
from tests.convert.worlds import MODEL, Reference, keys_that_megatron_core_loads_differently, make_recipe
from tests.gloo import run_world

SAME_SHARDS = ExportOptions(max_shard_bytes=200_000, verify=False)
MTP = "mtp-1-of-1.safetensors"


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be spoilt."""
    return shutil.copytree(exported, tmp_path / "hf")


def file_of(folder: Path, name: str) -> str:
    return str(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name])


def test_hugging_face_to_megatron_and_back_gives_identical_files(exported: Path, tmp_path: Path) -> None:
    from_hf(exported, tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "hf", SAME_SHARDS)
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert files == sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    for name in [*files, "model.safetensors.index.json", "config.json"]:
        assert (tmp_path / "hf" / name).read_bytes() == (exported / name).read_bytes(), name


def test_however_large_a_file_is_one_piece_of_it_is_in_memory(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    load = ImportJob.load

    def watched(self: ImportJob, part: Part, dtype: torch.dtype) -> torch.Tensor:
        alive.append(sum(piece() is not None for piece in pieces))
        tensor = load(self, part, dtype)
        pieces.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(ImportJob, "load", watched)
    from_hf(exported, tmp_path / "ckpt", verify=False)
    assert len(list((tmp_path / "ckpt").glob("*.distcp"))) == 1
    assert len(alive) > 100
    assert max(alive) <= 1  # the one that has just been written


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_megatron_to_hugging_face_and_back_gives_identical_tensors(
    dtype: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    made: Reference = request.getfixturevalue("reference" if dtype == "fp32" else "reference_bf16")
    to_hf(made.checkpoint, tmp_path / "hf", ExportOptions(verify=False))
    done = from_hf(tmp_path / "hf", tmp_path / "ckpt")
    assert done.precision == dtype
    with TensorStore(open_checkpoint(tmp_path / "ckpt")) as store:
        assert store.shapes.keys() == made.weights.keys()
        for key, expected in made.weights.items():
            assert store.dtypes[key] == expected.dtype
            assert torch.equal(store.read(key), expected), key


def test_what_transformers_saves_can_be_imported(exported: Path, reference: Reference, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, local_files_only=True)
    model.save_pretrained(tmp_path / "saved")
    # transformers drops the MTP layer, so the config has to say that there is none.
    edit_json(tmp_path / "saved" / "config.json", num_nextn_predict_layers=0, num_mtp_layers=0)
    from_hf(tmp_path / "saved", tmp_path / "ckpt")
    with TensorStore(open_checkpoint(tmp_path / "ckpt")) as store:
        assert store.shapes.keys() == {key for key in reference.weights if not key.startswith("mtp.")}
        for key in store.shapes:
            assert torch.equal(store.read(key), reference.weights[key]), key


def test_a_padded_vocabulary_is_zeros_inside_and_gone_again_outside(exported: Path, tmp_path: Path) -> None:
    done = from_hf(exported, tmp_path / "ckpt", make_recipe(vocab_size=112))
    assert done.recipe == "minuscule"
    with TensorStore(open_checkpoint(tmp_path / "ckpt")) as store:
        assert store.shapes["output_layer.weight"] == (112, 40)
        assert not store.read("embedding.word_embeddings.weight", (98, 0), (14, 40)).any()
    to_hf(tmp_path / "ckpt", tmp_path / "hf", SAME_SHARDS)
    before, after = all_tensors(exported), all_tensors(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_megatron_cores_own_loader_takes_an_imported_checkpoint(
    exported: Path, reference: Reference, tmp_path: Path
) -> None:
    from_hf(exported, tmp_path / "ckpt")
    assert run_world(keys_that_megatron_core_loads_differently, 1, tmp_path / "ckpt", reference) == [[]]


def test_with_a_recipe_a_run_is_made_ready(exported: Path, tmp_path: Path) -> None:
    recipe = make_recipe()
    out = tmp_path / "run" / "checkpoints" / "step_00000000"
    done = from_hf(exported, out, recipe)
    assert done.run_recipe == tmp_path / "run" / "recipe.toml"
    assert (tmp_path / "run" / "recipe.toml").read_text() == dump_recipe(recipe) == (out / "recipe.toml").read_text()
    marker = open_checkpoint(out).marker
    assert (marker.step, marker.optimizer_step) == (0, None)
    assert marker.state["imported"]["vocab_size"] == MODEL["vocab_size"]


def test_without_a_recipe_one_is_made_from_the_config(exported: Path, tmp_path: Path) -> None:
    from_hf(exported, tmp_path / "ckpt")
    made = load_recipe(str(tmp_path / "ckpt" / "recipe.toml"))
    expected = make_recipe().model
    assert made.model.model_copy(update={"backend": expected.backend}) == expected


def test_a_recipe_of_another_model_is_refused_with_the_keys_that_differ(exported: Path, tmp_path: Path) -> None:
    recipe = make_recipe(num_hidden_layers=6, n_routed_experts=8)
    with pytest.raises(UserError) as caught:
        from_hf(exported, tmp_path / "ckpt", recipe)
    assert "num_hidden_layers (6 against 4), n_routed_experts (8 against 6)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ckpt").exists()


def test_a_recipe_that_would_round_the_weights_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params_dtype bf16 would round the fp32 weights"):
        from_hf(exported, tmp_path / "ckpt", make_recipe("bf16"))


def refused(folder: Path, match: str) -> None:
    """Importing is refused in one line and leaves nothing."""
    out = folder.parent / "ckpt"
    with pytest.raises(UserError, match=match) as caught:
        from_hf(folder, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_a_missing_tensor_is_named(folder: Path) -> None:
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    edit_tensors(folder, file_of(folder, name), {name: None})
    refused(folder, rf"hf: lacks {name};")


def test_an_extra_tensor_is_named(folder: Path) -> None:
    edit_tensors(folder, MTP, {"model.layers.4.mlp.gate.weight": torch.zeros(6, 40)})
    refused(
        folder,
        r"has model\.layers\.4\.mlp\.gate\.weight \(in mtp-1-of-1\.safetensors\), which the model has no place for",
    )


def test_a_renamed_tensor_is_named_under_both_names(folder: Path) -> None:
    norm = all_tensors(folder)["model.layers.4.hnorm.weight"]
    edit_tensors(folder, MTP, {"model.layers.4.hnorm.weight": None, "model.layers.4.h_norm.weight": norm})
    refused(folder, r"lacks model\.layers\.4\.hnorm\.weight; has model\.layers\.4\.h_norm\.weight")


def test_a_transposed_tensor_is_named_with_both_shapes(folder: Path) -> None:
    projection = all_tensors(folder)["model.layers.4.eh_proj.weight"]
    edit_tensors(folder, MTP, {"model.layers.4.eh_proj.weight": projection.T})
    refused(folder, r"eh_proj\.weight \(in mtp-1-of-1\.safetensors\) is \[80, 40\], expected \[40, 80\]")


def test_a_model_that_could_not_be_trained_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", num_experts_per_tok=7)
    refused(folder, r"config\.json: no model that can be trained: .*num_experts_per_tok")


def test_a_second_head_that_is_no_copy_is_refused(folder: Path) -> None:
    head = all_tensors(folder)["lm_head.weight"].clone()
    head[3, 5] += 1
    edit_tensors(folder, MTP, {"model.layers.4.shared_head.head.weight": head})
    refused(folder, r"shared_head\.head\.weight differs from lm_head\.weight")


def test_a_config_of_more_layers_than_there_are_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=5)
    refused(folder, r"lacks model\.layers\.4\.mlp\.experts\.0\.down_proj\.weight")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_group": 8}, r"n_group is 8, expected 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, r"rope_scaling is \{.*yarn.*expected null"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings is true, expected false"),
        ({"scoring_func": "softmax"}, r'scoring_func is "softmax", expected "sigmoid"'),
        ({"q_lora_rank": None}, r"config\.json: lacks q_lora_rank; each says what the weights compute"),
        ({"rope_theta": None, "rms_norm_eps": None}, r"config\.json: lacks rope_theta, rms_norm_eps; "),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            r'model_type is "llama", expected "deepseek_v3" or "joyai_llm_flash"',
        ),
        ({"hidden_size": "40"}, r"config\.json: hidden_size: input should be a valid integer"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            r"weights are quantised \(gptq\); expected fp8, blockwise_int8",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, r"weight_block_size is None; expected two whole numbers"),
    ],
)
def test_another_architecture_is_refused_by_its_key(folder: Path, changes: dict[str, object], match: str) -> None:
    edit_json(folder / "config.json", **changes)
    refused(folder, match)


def test_a_config_that_says_quantised_of_plain_weights_is_refused(folder: Path) -> None:
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit_json(folder / "config.json", quantization_config=quantised)
    refused(folder, r"config\.json: quantization_config says .* quantised, no tensor has a weight_scale_inv; ")


def test_a_place_inside_a_file_is_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a/ckpt: .*/file is a file; name a new folder inside a folder"):
        from_hf(exported, tmp_path / "file" / "a" / "ckpt")


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path = path if path.exists() else sorted(folder.glob("model-0*"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, rf"{path.name}: not a whole safetensors file")


def test_an_absent_file_is_named(folder: Path) -> None:
    (folder / MTP).unlink()
    refused(folder, rf"{MTP}: not there, though model\.safetensors\.index\.json names it")


def test_an_index_that_points_elsewhere_is_named(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = MTP
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"says that model\.norm\.weight is in mtp-1-of-1\.safetensors, it is in model-")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "weights.bin"])
def test_an_index_cannot_lead_outside_its_folder_or_to_a_pickle(folder: Path, name: str) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "expected a .safetensors file beside the index")


def test_a_pickle_in_place_of_safetensors_is_never_opened(folder: Path) -> None:
    for path in folder.glob("*safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(folder, r"only pytorch_model\.bin, a pickle, which is never opened")


def test_a_file_of_noise_is_no_safetensors(folder: Path) -> None:
    (folder / MTP).write_bytes(b"\xff" * 1000)
    refused(folder, rf"{MTP}: not a whole safetensors file")


def test_another_dtype_is_named(folder: Path) -> None:
    edit_tensors(folder, MTP, {"model.layers.4.hnorm.weight": torch.ones(40, dtype=torch.float16)})
    refused(folder, r"model\.layers\.4\.hnorm\.weight is F16; expected F32 or BF16")


def test_mixed_dtypes_are_named(folder: Path) -> None:
    edit_tensors(folder, MTP, {"model.layers.4.hnorm.weight": torch.ones(40, dtype=torch.bfloat16)})
    refused(folder, r"weights of several dtypes \(model\.layers\.4\.hnorm\.weight is bfloat16, .* is float32\)")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    refused(tmp_path, r"config\.json: not there; expected a Hugging Face model folder")
    refused(tmp_path / "model.safetensors", r"config\.json: not there; expected a Hugging Face model folder")


def test_an_existing_checkpoint_is_not_overwritten(exported: Path, tmp_path: Path) -> None:
    from_hf(exported, tmp_path / "ckpt")
    before = (tmp_path / "ckpt" / "COMMITTED.json").read_bytes()
    with pytest.raises(UserError, match="is there already"):
        from_hf(exported, tmp_path / "ckpt")
    assert (tmp_path / "ckpt" / "COMMITTED.json").read_bytes() == before


def test_a_name_of_another_step_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"imported weights are of step 0; name it .*step_00000000"):
        from_hf(exported, tmp_path / "step_00000100")
