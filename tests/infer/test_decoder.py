"""The decoder computes what transformers and the training model compute, all at once or token by token."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_joy.errors import UserError
from megatron_joy.infer.decoder import Decoder
from megatron_joy.infer.generate import pad
from megatron_joy.infer.weights import open_weights
from tests.convert.worlds import LENGTH, MODEL, Reference
from tests.infer.conftest import decoder_of

CLOSE = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(autouse=True)
def inference():  # type: ignore[no-untyped-def]
    with torch.inference_mode():
        yield


def test_the_full_forward_gives_the_training_models_logits(decoder: Decoder, reference: Reference) -> None:
    outputs = reference.outputs
    torch.testing.assert_close(decoder.forward(outputs["ids"]).logits, outputs["logits"], **CLOSE)


def test_the_full_forward_gives_transformers_logits(decoder: Decoder, exported: Path, reference: Reference) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, local_files_only=True).eval()
    ids = reference.outputs["ids"]
    torch.testing.assert_close(decoder.forward(ids).logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [10, 1, 1, 36], [1, 47], [48]], ids=str)
def test_the_latent_cache_gives_the_full_forwards_logits(
    pieces: list[int], decoder: Decoder, reference: Reference
) -> None:
    ids = reference.outputs["ids"]
    full = decoder.forward(ids)
    cache = decoder.new_cache(torch.zeros(2, dtype=torch.int64), LENGTH)
    parts = [decoder.decode(piece, cache) for piece in ids.split(pieces, dim=1)]
    assert cache.length == LENGTH
    torch.testing.assert_close(torch.cat([part.logits for part in parts], dim=1), full.logits, **CLOSE)
    torch.testing.assert_close(torch.cat([part.hidden for part in parts], dim=1), full.hidden, **CLOSE)


def test_a_row_that_is_padded_on_the_left_is_as_if_alone(decoder: Decoder, reference: Reference) -> None:
    ids = reference.outputs["ids"]
    long, short = ids[0, :20].tolist(), ids[1, :7].tolist()
    rows, padding = pad([long, short], torch.device("cpu"))
    cache = decoder.new_cache(padding, 30)
    first = decoder.decode(rows, cache).logits
    following = decoder.decode(ids[:, 30:32], cache).logits
    for row, prompt in enumerate([long, short]):
        alone = decoder.forward(torch.tensor([prompt + ids[row, 30:32].tolist()])).logits[0]
        torch.testing.assert_close(first[row, -1], alone[-3], **CLOSE)
        torch.testing.assert_close(following[row], alone[-2:], **CLOSE)


def test_a_cropped_cache_has_forgotten(decoder: Decoder, reference: Reference) -> None:
    ids = reference.outputs["ids"][:1]
    cache = decoder.new_cache(torch.zeros(1, dtype=torch.int64), 20)
    decoder.decode(ids[:, :12], cache)
    cache.crop(8)
    again = decoder.decode(ids[:, 20:23], cache).logits
    other = decoder.forward(torch.cat([ids[:, :8], ids[:, 20:23]], dim=1)).logits[:, 8:]
    torch.testing.assert_close(again, other, **CLOSE)


def test_the_cache_keeps_one_latent_and_one_rotary_key_per_token(decoder: Decoder) -> None:
    cache = decoder.new_cache(torch.zeros(1, dtype=torch.int64), 1)
    assert cache.bytes_per_token == 4 * MODEL["num_hidden_layers"] * (MODEL["kv_lora_rank"] + MODEL["qk_rope_head_dim"])


def test_the_mtp_layer_gives_the_training_models_mtp_logits(decoder: Decoder, reference: Reference) -> None:
    outputs, ids = reference.outputs, reference.outputs["ids"]
    assert decoder.predictor is not None
    hidden = decoder.forward(ids).hidden[:, :-1]
    states = decoder.predictor(hidden, ids[:, 1:], None)
    torch.testing.assert_close(decoder.logits(states), outputs["mtp_logits"][:, :-1], **CLOSE)


def test_the_mtp_layers_cache_gives_its_full_forward(decoder: Decoder, reference: Reference) -> None:
    ids = reference.outputs["ids"][:1]
    assert decoder.predictor is not None
    hidden, following = decoder.forward(ids).hidden[:, :-1], ids[:, 1:]
    cache = decoder.predictor.new_cache(torch.zeros(1, dtype=torch.int64), LENGTH)
    pieces = zip(hidden.split([30, 1, 16], dim=1), following.split([30, 1, 16], dim=1), strict=True)
    parts = [decoder.predictor(states, tokens, cache) for states, tokens in pieces]
    torch.testing.assert_close(torch.cat(parts, dim=1), decoder.predictor(hidden, following, None), **CLOSE)


def test_checkpoint_and_folder_hold_the_same_weights(reference: Reference, exported: Path) -> None:
    with open_weights(reference.checkpoint) as ours, open_weights(exported) as theirs:
        assert ours.model.model_copy(update={"backend": "auto"}) == theirs.model
        for name in ("lm_head.weight", "model.layers.2.mlp.experts.3.up_proj.weight", "model.layers.4.eh_proj.weight"):
            assert torch.equal(ours.read(name), theirs.read(name))


def test_a_checkpoint_writes_what_its_export_writes(decoder: Decoder, reference: Reference) -> None:
    ids = reference.outputs["ids"]
    ours = decoder_of(reference.checkpoint.parents[1]).forward(ids).logits
    torch.testing.assert_close(ours, decoder.forward(ids).logits, atol=0, rtol=0)


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder; expected a run, a checkpoint or a Hugging Face model"):
        decoder_of(tmp_path / "nothing")
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        decoder_of(tmp_path)
