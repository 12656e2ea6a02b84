"""A minuscule JoyAI for tests: four layers (one dense, three with eight experts) and the MTP layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_joy.data.batch import Batch, make_batch
from megatron_joy.data.stream import Sample
from megatron_joy.recipe.schema import (
    DataSection,
    LayoutSection,
    ModelSection,
    OptimizerSection,
    PrecisionSection,
    Recipe,
    ScheduleSection,
    TrainSection,
)

EOD = 0
VOCABULARY, LENGTH = 96, 32

MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1000.0,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,  # wide, so that every part of the model has a say in the logits
    "backend": "portable",
}


def small_recipe(
    layout: dict[str, Any] | None = None, model: dict[str, Any] | None = None, train: dict[str, Any] | None = None
) -> Recipe:
    """The recipe, with these keys of three of its sections otherwise."""
    return Recipe(
        name="small",
        seed=11,
        model=ModelSection(**MODEL | (model or {})),
        layout=LayoutSection(**layout or {}),
        data=DataSection(sequence_length=LENGTH),
        train=TrainSection(**{"steps": 100, "global_batch_size": 4, "micro_batch_size": 1} | (train or {})),
        optimizer=OptimizerSection(clip_grad=1e9),  # gradients stay as they are, and their norm is told
        schedule=ScheduleSection(peak_lr=1e-2, final_lr=1e-3),
        precision=PrecisionSection(params_dtype="fp32"),
    )


def row(lengths: Sequence[int], seed: int) -> Tensor:
    """A sample of LENGTH + 1 tokens: documents of these lengths, eod included, then one that goes on past the end."""
    text = torch.randint(1, VOCABULARY, (LENGTH + 1,), generator=torch.Generator().manual_seed(seed))
    for end in torch.tensor(list(lengths)).cumsum(0).tolist():
        text[end - 1] = EOD
    return text


# Rows with different numbers of targets: no border, many, an eod as first and as last input, empty documents.
ROWS = [row([], 1), row([5, 1, 9, 2, 7], 2), row([1, 12], 3), row([10, 22], 4)]


def batch(rows: Sequence[Tensor]) -> Batch:
    """A micro-batch of rows."""
    return make_batch([Sample(r.numpy(), "rows", 0, i, 0, EOD) for i, r in enumerate(rows)], True, EOD)
