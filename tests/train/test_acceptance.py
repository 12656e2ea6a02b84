"""Drafts counted in training are those of speculative decoding with the exported weights, in every layout."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_joy.infer.decoder import Decoder
from megatron_joy.infer.generate import Limits
from megatron_joy.infer.speculative import Acceptance as Decoded
from megatron_joy.infer.speculative import generate_speculatively
from megatron_joy.infer.weights import build_decoder, open_weights
from megatron_joy.recipe.schema import LayoutSection
from tests.convert.worlds import LENGTH, make_recipe
from tests.gloo import run_world
from tests.infer.training import pattern, train_on_a_pattern

PASSES, ROWS, SEED = 4, 4, 4242
LAYOUTS: dict[str, dict[str, Any]] = {
    "EP2": {"expert_model_parallel_size": 2, "data_parallel_size": 2},
    "TP2": {"tensor_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "TP2 PP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}


def _batches() -> Any:
    """Two micro-batches of two rows, with a border in the first half of each."""
    from megatron_joy.data.batch import make_batch
    from megatron_joy.data.stream import Sample

    rows = pattern(ROWS, LENGTH + 1, SEED)
    rows[:, 5] = 0
    samples = [Sample(row, "pattern", 0, 0, 0, 0) for row in rows]
    return [make_batch(samples[i : i + 2], True, 0) for i in (0, 2)]


def exchanged(weight: torch.Tensor) -> torch.Tensor:
    """[h, 2h] with its halves in the other order."""
    return torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)


def _measured(checkpoints: Path, layout: dict[str, Any], drafts: int = 3, broken: bool = False) -> tuple[Any, Any]:
    """Acceptance over both micro-batches with the trained weights, one on each replica or both on the only one."""
    from megatron_joy.checkpoint.load import choose, load_checkpoint
    from megatron_joy.model.build import build_model
    from megatron_joy.platform import process as platform
    from megatron_joy.recipe.derive import nearest_split
    from megatron_joy.train.acceptance import measure_acceptance
    from megatron_joy.train.step import Trainer

    recipe = make_recipe()
    chunks_in_all = LayoutSection(**layout).pipeline_chunks
    counts = nearest_split(recipe.model.num_hidden_layers, chunks_in_all) if chunks_in_all > 1 else None
    recipe = recipe.model_copy(update={"layout": LayoutSection(**layout, pipeline_layer_counts=counts)})
    process = platform.start(recipe.layout, recipe.seed)
    chunks = build_model(recipe, process)
    trainer = Trainer(recipe, process, chunks)
    checkpoint = choose(checkpoints, process).checkpoint
    assert checkpoint is not None
    load_checkpoint(checkpoint, chunks=chunks, optimizer=None, process=process)
    if broken:  # the halves for embedding and hidden state change places, as a wrong concatenation would have it
        weight = chunks[0].mtp.layers[0].eh_proj.weight
        weight.data = exchanged(weight.data)
    batches, found = _batches(), []
    # Interleaved chunks take as many at a time as there are stages.
    asked = [[batch] for batch in batches] if len(chunks) == 1 else [batches]
    for some in asked if process.groups.dp.size() == 1 else [asked[process.groups.dp.rank()]]:
        found.append(measure_acceptance(trainer, some, PASSES, drafts))
    return sum(one.passes for one in found), [
        sum(column) for column in zip(*(one.accepted for one in found), strict=True)
    ]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_world(train_on_a_pattern, 1, folder)
    return folder


@pytest.fixture(scope="module")
def decoder(checkpoints: Path) -> Decoder:
    with open_weights(checkpoints / "step_00000060") as weights:
        return build_decoder(weights, "fp32")


def decoded(decoder: Decoder, drafts: int) -> tuple[int, list[int]]:
    """Passes of speculative decoding, and how many of them had their first, first two, ... drafts right."""
    accepted = [0] * drafts
    for row in pattern(ROWS, LENGTH + 1, SEED)[:, 6 : LENGTH // 2].tolist():  # behind the border
        told, before = Decoded(), 0
        for _ in generate_speculatively(decoder, row, Limits(PASSES * (drafts + 1) + 1), drafts, told):
            if told.tokens > before:  # a pass has ended: all its tokens but one were drafts
                for place in range(told.tokens - before - 1):
                    accepted[place] += 1
                before = told.tokens
            if told.passes == PASSES:
                break
    return PASSES * ROWS, accepted


@pytest.mark.parametrize("drafts", [1, 3])
def test_one_process_counts_what_speculative_decoding_does(drafts: int, checkpoints: Path, decoder: Decoder) -> None:
    expected = decoded(decoder, drafts)
    assert expected[1][0] > 0.5 * expected[0]  # the layer is worth asking
    assert run_world(_measured, 1, checkpoints, {}, drafts)[0] == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_counts_the_same(name: str, checkpoints: Path, decoder: Decoder) -> None:
    size = LayoutSection(**LAYOUTS[name]).world_size
    assert run_world(_measured, size, checkpoints, LAYOUTS[name]) == [decoded(decoder, 3)] * size


def test_a_broken_head_is_seen_and_counted_right_as_well(checkpoints: Path, decoder: Decoder) -> None:
    passes, accepted = run_world(_measured, 1, checkpoints, {}, 3, True)[0]
    assert sum(accepted) < 0.5 * sum(decoded(decoder, 3)[1])
    wrong = copy.copy(decoder)
    wrong.predictor = copy.copy(decoder.predictor)
    assert wrong.predictor is not None
    wrong.predictor.projection = exchanged(wrong.predictor.projection)
    assert (passes, accepted) == decoded(wrong, 3)


def test_length_and_ratio_are_the_papers() -> None:
    """Length counts the pass's own token, ratio is accepted over drafted: 2.20 and 40 % fit (2.20 - 1) / 3."""
    from megatron_joy.train.acceptance import Acceptance

    found = Acceptance(passes=100, accepted=(60, 40, 20))
    assert found.length == pytest.approx(2.2)
    assert found.ratio == pytest.approx(0.4)
    assert found.as_row()["mtp_acceptance_1"] == 0.6


def test_the_line_of_a_validation_says_what_drafts_are_worth() -> None:
    from megatron_joy.train.features.terminal import headline

    row = {"loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 10.0, "validation_loss": 3.0}
    assert "with drafts 1.75 tokens a pass" in headline(1, 2, row | {"mtp_acceptance_length": 1.75})
    assert "drafts" not in headline(1, 2, row)
