"""What attention remembers of earlier tokens: per layer and token a key-value latent and one rotary key, no heads.

For JoyAI-LLM Flash that is 512 + 64 numbers against 32 x (192 + 128) of keys and values: 18 times less.
Letters: b rows, n cached tokens, r width of the latent, p width of the rotary key.
"""

import torch
from torch import Tensor

from megatron_joy.recipe.schema import ModelSection


class LatentCache:
    """Room for `capacity` tokens of `rows` texts in `layers` layers; `length` of them are filled, in every row alike.

    padding [b] int64: how many of a row's first tokens are no text (rows of different lengths end together).
    """

    def __init__(
        self, model: ModelSection, layers: int, padding: Tensor, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (layers, padding.shape[0], capacity)
        self.latent = torch.empty((*shape, model.kv_lora_rank), dtype=dtype, device=device)  # [layers, b, capacity, r]
        self.rotary = torch.empty((*shape, model.qk_rope_head_dim), dtype=dtype, device=device)  # [.., p]
        self.padding, self.capacity, self.length = padding, capacity, 0

    def append(self, layer: int, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [b, t, r] and [b, t, p] of the next t tokens; returns all of the layer's: [b, n + t, r], [b, n + t, p].

        `length` stays until `advance`, since every layer adds the same tokens.
        """
        end = self.length + latent.shape[1]
        self.latent[layer, :, self.length : end] = latent
        self.rotary[layer, :, self.length : end] = rotary
        return self.latent[layer, :, :end], self.rotary[layer, :, :end]

    def advance(self, tokens: int) -> None:
        """Counts tokens that every layer has added."""
        self.length += tokens

    def crop(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        self.length = length

    @property
    def bytes_per_token(self) -> int:
        """Of one row, over all layers."""
        layers = self.latent.shape[0]
        return layers * (self.latent.shape[-1] + self.rotary.shape[-1]) * self.latent.element_size()
