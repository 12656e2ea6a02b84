"""Another base of rotary positions for a model that is there already: context extension between two updates."""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding


def set_rotary_base(chunks: Iterable[Any], base: float) -> None:
    """Gives every rotary embedding the frequencies base^(-2i/d), as if the model had been built with this base.

    No weight changes: the frequencies are no parameters and in no checkpoint.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, RotaryEmbedding):
                old = module.inv_freq
                width = 2 * old.numel()
                powers = torch.arange(0, width, 2, dtype=torch.float32, device=old.device) / width
                module.inv_freq = 1.0 / (base**powers)
    RotaryEmbedding.forward.cache_clear()  # it keeps tables by length alone
