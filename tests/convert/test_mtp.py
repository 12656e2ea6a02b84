"""The exported MTP layer computes what the training model's computes, in code that knows nothing of Megatron."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from tests.convert.tampering import all_tensors
from tests.convert.worlds import MODEL, Reference

PREFIX = f"model.layers.{MODEL['num_hidden_layers']}."


def load_main_model(folder: Path) -> Any:
    """transformers' model, which itself leaves the MTP layer out."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def model(exported: Path) -> Any:
    return load_main_model(exported)


def dense_mtp_layer(model: Any, tensors: dict[str, Tensor]) -> MtpLayer:
    """transformers' own MTP layer with the exported weights; it thinks of MoE, so it is told that layers are dense."""
    config = model.config.get_mtp_config()
    config.first_k_dense_replace = 1
    config._attn_implementation = "eager"
    layer = MtpLayer(config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, layer_idx=0).eval()
    outer = ("enorm.", "hnorm.", "eh_proj.")
    state = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(PREFIX)
        if short == name or short == "shared_head.head.weight":
            continue
        inside = short if short.startswith(outer) else f"mtp_block.{short}"
        state["post_norm.weight" if short == "shared_head.norm.weight" else inside] = tensor
    layer.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    return layer


def mtp_logits(model: Any, layer: MtpLayer, ids: Tensor) -> Tensor:
    """ids [b, s] -> logits [b, s - 1, v]: at t those of token t+2, from hidden state t and the embedding of t+1."""
    hidden = model.model(ids).last_hidden_state[:, :-1]
    positions = torch.arange(ids.shape[1] - 1)[None]
    mask = torch.full((ids.shape[1] - 1,) * 2, float("-inf")).triu(1)[None, None]
    states = layer(
        inputs_embeds=model.model.embed_tokens(ids[:, 1:]),
        previous_hidden_state=hidden,
        position_embeddings=model.model.rotary_emb(hidden, positions),
        attention_mask=mask,
        position_ids=positions,
        past_key_values=None,
    )
    return model.lm_head(states)


def test_transformers_mtp_layer_gives_the_training_models_mtp_logits(
    model: Any, exported: Path, reference: Reference
) -> None:
    outputs = reference.outputs
    with torch.no_grad():
        logits = mtp_logits(model, dense_mtp_layer(model, all_tensors(exported)), outputs["ids"])
    expected = outputs["mtp_logits"][:, :-1]  # the last position has no successor
    assert float(expected.abs().max()) > 1.0
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_the_mtp_loss_is_that_of_the_exported_layer(model: Any, exported: Path, reference: Reference) -> None:
    outputs = reference.outputs
    ids = outputs["ids"]
    with torch.no_grad():
        logits = mtp_logits(model, dense_mtp_layer(model, all_tensors(exported)), ids)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, outputs["mtp_loss_sum"], rtol=1e-6, atol=0)


def test_the_head_beside_the_mtp_layer_is_a_copy_of_the_main_head(exported: Path) -> None:
    tensors = all_tensors(exported)
    assert torch.equal(tensors[PREFIX + "shared_head.head.weight"], tensors["lm_head.weight"])
