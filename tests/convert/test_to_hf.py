"""An export is what transformers reads without our code, bit for bit the checkpoint, or it is not there at all."""

import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM

from megatron_joy.checkpoint.marker import MARKER, RECIPE, Checkpoint, Marker
from megatron_joy.convert import export_job as room
from megatron_joy.convert.export_job import ExportOptions
from megatron_joy.convert.mapping import conversion_plan
from megatron_joy.convert.provenance import data_read, data_summary
from megatron_joy.convert.to_hf import to_hf
from megatron_joy.errors import UserError, WorkError
from megatron_joy.recipe import dump_recipe
from megatron_joy.recipe.ledger import as_json, begin
from megatron_joy.recipe.schema import DataSection, SourceEntry
from tests.convert.tampering import all_tensors, recommit
from tests.convert.tokenizers_made import make_tokenizer
from tests.convert.worlds import LENGTH, Reference, make_recipe

QUICK = ExportOptions(verify=False)


def load(folder: Path) -> Any:
    """The folder in transformers, in fp32."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()


def test_transformers_gives_the_training_models_logits(exported: Path, reference: Reference) -> None:
    model = load(exported)
    assert type(model) is DeepseekV3ForCausalLM
    outputs = reference.outputs
    with torch.no_grad():
        logits = model(outputs["ids"]).logits
    assert float(outputs["logits"].abs().max()) > 1.0  # something to agree on
    torch.testing.assert_close(logits, outputs["logits"], atol=1e-5, rtol=0)


def test_router_biases_are_not_zero_and_change_the_logits(exported: Path, reference: Reference) -> None:
    model, outputs = load(exported), reference.outputs
    biases = [value for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    assert all(bias.abs().min() > 0 for bias in biases)
    for bias in biases:
        bias.zero_()
    with torch.no_grad():
        assert (model(outputs["ids"]).logits - outputs["logits"]).abs().max() > 1e-2


def test_a_bf16_run_is_exported_in_bf16_and_agrees_in_fp32(reference_bf16: Reference, tmp_path: Path) -> None:
    done = to_hf(reference_bf16.checkpoint, tmp_path / "hf", QUICK)
    assert done.precision == "bf16"
    tensors = all_tensors(tmp_path / "hf")
    assert {name for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16} == {
        f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2, 3)
    }
    assert load(tmp_path / "hf").config.dtype == torch.float32  # as asked
    assert AutoConfig.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16
    with torch.no_grad():
        logits = load(tmp_path / "hf")(reference_bf16.outputs["ids"]).logits
    torch.testing.assert_close(logits, reference_bf16.outputs["logits"], atol=1e-5, rtol=0)


def test_every_tensor_has_the_bits_of_the_training_model(exported: Path, reference: Reference) -> None:
    tensors, weights = all_tensors(exported), reference.weights
    plan = conversion_plan(make_recipe().model)
    assert tensors.keys() == plan.by_name.keys()
    for name, tensor in plan.by_name.items():
        box = tuple(slice(a, a + n) for a, n in zip(tensor.start, tensor.size, strict=True))
        assert torch.equal(tensors[name], weights[tensor.key][box].view(tensor.shape)), name


def test_the_mtp_layer_lies_in_a_file_of_its_own_that_the_index_lists(exported: Path) -> None:
    weight_map = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    predictor = {name for name in weight_map if name.startswith("model.layers.4.")}
    assert {weight_map[name] for name in predictor} == {"mtp-1-of-1.safetensors"}
    assert {"model.layers.4.shared_head.head.weight", "model.layers.4.eh_proj.weight"} <= predictor
    assert [name for name, file in weight_map.items() if file.startswith("mtp") and name not in predictor] == []


def test_shards_are_numbered_and_no_larger_than_asked(exported: Path) -> None:
    shards = sorted(exported.glob("model-*.safetensors"))
    count = len(shards)
    assert count > 2
    assert [path.name for path in shards] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for path in shards:
        with safe_open(path, framework="pt") as stream:
            names = list(stream.keys())
            assert sum(stream.get_tensor(name).nbytes for name in names) <= 200_000


def test_config_says_what_the_recipe_says(exported: Path) -> None:
    config, model = AutoConfig.from_pretrained(exported), make_recipe().model
    for key in ("hidden_size", "q_lora_rank", "kv_lora_rank", "n_routed_experts", "num_hidden_layers", "vocab_size"):
        assert getattr(config, key) == getattr(model, key), key
    assert config.model_type == "deepseek_v3"
    assert config.rope_parameters["rope_theta"] == model.rope_theta
    assert config.rope_parameters["rope_type"] == "default"
    assert config.rope_interleave
    assert config.num_nextn_predict_layers == 1
    assert (config.n_group, config.topk_group, config.norm_topk_prob) == (1, 1, True)


def test_the_released_family_can_be_written(reference: Reference, tmp_path: Path) -> None:
    to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions(family="joyai_llm_flash", verify=False))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "joyai_llm_flash"


def test_provenance_names_run_step_and_every_tensors_hash(exported: Path) -> None:
    content = json.loads((exported / "joy_conversion.json").read_text())
    assert content["checkpoint"]["step"] == 7
    assert content["checkpoint"]["progress"]["tokens"] > 0
    assert content["tensors"].keys() == all_tensors(exported).keys()
    assert content["tensors"]["lm_head.weight"]["megatron"] == "output_layer.weight"
    assert len(content["tensors"]["lm_head.weight"]["blake3"]) == 64


def test_a_run_folder_stands_for_its_newest_whole_checkpoint(reference: Reference, tmp_path: Path) -> None:
    run = shutil.copytree(reference.checkpoint.parents[1], tmp_path / "run")
    torn = run / "checkpoints" / "step_00000009"
    shutil.copytree(reference.checkpoint, torn)
    (torn / MARKER).unlink()
    done = to_hf(run, tmp_path / "hf", QUICK)
    assert done.step == 7
    assert any("step_00000009" in note and "passed over" in note for note in done.notes)


def test_the_tokenizer_goes_along_and_its_ids_are_in_the_configs(large: Reference, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", 290)
    (tokenizer / "modeling_evil.py").write_text("raise SystemExit")
    to_hf(large.checkpoint, tmp_path / "hf", ExportOptions(tokenizer=tokenizer, verify=False))
    assert not (tmp_path / "hf" / "modeling_evil.py").exists()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    text = "def f(x):\n    return 'ä€'"
    assert loaded.decode(loaded(text).input_ids) == text
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": loaded.eos_token_id, "pad_token_id": loaded.pad_token_id}
    assert load(tmp_path / "hf").generation_config.eos_token_id == 0


def test_a_tokenizer_with_more_ids_than_rows_is_refused(reference: Reference, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", 290)
    with pytest.raises(UserError, match=r"tokenizer\.json: has ids up to 289, the model's end at 97"):
        to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions(tokenizer=tokenizer, verify=False))
    assert not (tmp_path / "hf").exists()


def test_a_folder_without_tokenizer_is_refused(reference: Reference, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing/tokenizer\.json: not there.*--tokenizer"):
        to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions(tokenizer=tmp_path / "nothing", verify=False))


def test_nothing_is_overwritten(reference: Reference, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(UserError, match="is there already and not empty"):
        to_hf(reference.checkpoint, tmp_path, QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("precision", ["fp64", "int3"])
def test_a_precision_that_is_not_there_is_refused_with_those_that_are(
    precision: str, reference: Reference, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"--precision {precision}: .*expected bf16, fp32, fp8, int8, "):
        to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions(precision=precision))


@pytest.mark.parametrize("rows", [0, 99])
def test_a_vocabulary_that_the_model_does_not_have_is_refused(rows: int, reference: Reference, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"vocab_size {rows} does not fit model.vocab_size 98; expected 1 to that many"):
        to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions(vocabulary=rows, verify=False))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_family_is_refused(reference: Reference, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--family qwen: .*deepseek_v3 or joyai_llm_flash"):
        to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions(family="qwen"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("num_hidden_layers = 4", "num_hidden_layers = 3", r"has .*mtp.*|has decoder\.layers\.6"),
        ("n_routed_experts = 6", "n_routed_experts = 8", r"experts\.linear_fc1\.weight is \[6, 64, 40\], expected \[8"),
    ],
)
def test_a_checkpoint_of_another_model_than_its_recipe_is_refused(
    key: str, value: str, named: str, reference: Reference, tmp_path: Path
) -> None:
    copy = shutil.copytree(reference.checkpoint, tmp_path / "step_00000007")
    recommit(copy, RECIPE, lambda text: text.replace(key, value))
    with pytest.raises(UserError, match=named) as caught:
        to_hf(copy, tmp_path / "hf", QUICK)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hf").exists()


def test_a_torn_checkpoint_is_refused(reference: Reference, tmp_path: Path) -> None:
    copy = shutil.copytree(reference.checkpoint, tmp_path / "step_00000007")
    (data,) = copy.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a whole checkpoint"):
        to_hf(copy, tmp_path / "hf", QUICK)


def test_a_checkpoint_that_is_still_being_written_is_refused(reference: Reference, tmp_path: Path) -> None:
    copy = shutil.copytree(reference.checkpoint, tmp_path / "step_00000007")
    (copy / MARKER).unlink()
    with pytest.raises(UserError, match=r"COMMITTED\.json is missing \(the save was not finished\)"):
        to_hf(copy, tmp_path / "hf", QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]


def test_the_model_card_says_where_the_weights_are_from(exported: Path, reference: Reference) -> None:
    card = (exported / "README.md").read_text()
    assert "# minuscule, step 7" in card
    assert f"| tokens seen | {28 * LENGTH:,} |" in card
    assert f"| recipe | SHA-256 `{hashlib.sha256((reference.checkpoint / RECIPE).read_bytes()).hexdigest()}` |" in card
    assert "The checkpoint has no ledger of data" in card
    assert "Not verified (`--no-verify`)." in card


def test_the_data_summary_counts_what_each_source_gave() -> None:
    first = {"start": 0, "samples": 100, "sequence_length": 10, "blend": [["code", 1.0], ["web", 3.0]]}
    second = {"start": 60, "samples": 40, "sequence_length": 20, "blend": [["web", 1.0]]}
    ledger = [
        {"from_step": 0, "from_sample": 0, "stretches": [first], "skipped": [], "reason": ""},
        {"from_step": 6, "from_sample": 60, "stretches": [second], "skipped": [], "reason": ""},
    ]
    # 60 samples of 10 tokens under the first blend, then 15 of 20 under the second.
    assert data_summary({"ledger": ledger, "sources": {"web": "abc"}}, 75) == [
        {"source": "code", "tokens": 150, "fingerprint": None},
        {"source": "web", "tokens": 450 + 300, "fingerprint": "abc"},
    ]


def test_what_a_run_has_read_follows_from_its_checkpoint(tmp_path: Path) -> None:
    train = [SourceEntry(manifest="code", weight=1.0), SourceEntry(manifest="web", weight=3.0)]
    recipe = make_recipe().model_copy(update={"data": DataSection(sequence_length=LENGTH, train=train)})
    (tmp_path / RECIPE).write_text(dump_recipe(recipe))
    state = {"ledger": as_json(begin(recipe)), "sources": {}}
    marker = Marker(7, 0, 0.0, 1, {}, {}, "", None, state, ())
    read = data_read(Checkpoint(tmp_path, marker))
    # 7 updates of 4 samples.
    assert [(row["source"], row["tokens"]) for row in read] == [("code", 7 * LENGTH), ("web", 21 * LENGTH)]


def test_a_full_disk_leaves_nothing_behind(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(room, "write_file", refuse)
    with pytest.raises(WorkError, match="No space left on device; nothing was left there"):
        to_hf(reference.checkpoint, tmp_path / "hf", QUICK)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_known_before_anything_is_written(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs [\d,]+ bytes, the disk of .* has 1,000 left"):
        to_hf(reference.checkpoint, tmp_path / "hf", QUICK)


def test_rounding_to_bf16_is_said(reference: Reference, tmp_path: Path) -> None:
    done = to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions(precision="bf16", verify=False))
    assert "fp32 weights were rounded to bf16" in done.notes
    tensors = all_tensors(tmp_path / "hf")
    assert torch.equal(tensors["lm_head.weight"], reference.weights["output_layer.weight"].bfloat16())
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
