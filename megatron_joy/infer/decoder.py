"""The model that writes: the whole of JoyAI in one process, from weights with Hugging Face's names.

Letters as in `layers`; v vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_joy.infer.cache import LatentCache
from megatron_joy.infer.layers import Layer, Read, place, rms_norm
from megatron_joy.recipe.schema import ModelSection


@dataclass(frozen=True)
class Output:
    """logits [b, t, v]; hidden [b, t, h] after the final norm, from which logits and the MTP layer's drafts follow."""

    logits: Tensor
    hidden: Tensor


class Decoder:
    """Call under `torch.inference_mode()`. `read` gives weights by their Hugging Face names, ready to use."""

    def __init__(self, model: ModelSection, read: Read) -> None:
        self.model = model
        self.embedding, self.head = read("model.embed_tokens.weight"), read("lm_head.weight")
        self.norm = read("model.norm.weight")
        self.layers = [
            Layer(model, read, f"model.layers.{i}.", sparse=i >= model.first_k_dense_replace)
            for i in range(model.num_hidden_layers)
        ]
        self.predictor = Predictor(self, read) if model.num_nextn_predict_layers else None

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    def new_cache(self, padding: Tensor, capacity: int) -> LatentCache:
        """An empty cache of the decoder layers for rows with `padding` [b]."""
        return LatentCache(self.model, len(self.layers), padding, capacity, self.dtype, self.device)

    def forward(self, ids: Tensor) -> Output:
        """All tokens at once and nothing remembered. ids [b, t]."""
        return self._run(ids, None, torch.zeros(ids.shape[0], dtype=torch.int64, device=ids.device))

    def decode(self, ids: Tensor, cache: LatentCache) -> Output:
        """The next tokens of the cached texts. ids [b, t]; the cache takes them in."""
        output = self._run(ids, cache, cache.padding)
        cache.advance(ids.shape[1])
        return output

    def _run(self, ids: Tensor, cache: LatentCache | None, padding: Tensor) -> Output:
        at = place(self.model, padding, cache.length if cache else 0, ids.shape[1])
        x = F.embedding(ids, self.embedding)
        for i, layer in enumerate(self.layers):
            x = layer(x, at, i, cache)
        hidden = rms_norm(x, self.norm, self.model.rms_norm_eps)
        return Output(self.logits(hidden), hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., h] -> [..., v]."""
        return F.linear(hidden, self.head)


class Predictor:
    """The dense MTP layer: from the hidden state of token i and the token after it, the token after that.

    y = block(eh_proj([enorm(embedding of token i+1), hnorm(hidden i)])), with hidden after the main model's final norm;
    shared_head.norm(y) gives logits of token i+2 through the main head, and stands in for the next hidden state when
    the layer drafts further (arXiv 2412.19437, section 2.2; Megatron-core multi_token_prediction.py).
    """

    def __init__(self, decoder: Decoder, read: Read) -> None:
        model = decoder.model
        prefix = f"model.layers.{model.num_hidden_layers}."
        self.model, self.embedding = model, decoder.embedding
        self.embedding_norm, self.hidden_norm = read(prefix + "enorm.weight"), read(prefix + "hnorm.weight")
        self.projection = read(prefix + "eh_proj.weight")
        self.layer = Layer(model, read, prefix, sparse=False)
        self.norm = read(prefix + "shared_head.norm.weight")

    def new_cache(self, padding: Tensor, capacity: int) -> LatentCache:
        """An empty cache of this one layer."""
        return LatentCache(self.model, 1, padding, capacity, self.embedding.dtype, self.embedding.device)

    def __call__(self, hidden: Tensor, following: Tensor, cache: LatentCache | None) -> Tensor:
        """hidden [b, t, h] of tokens i, following [b, t] tokens i+1 -> normed states [b, t, h] that give tokens i+2."""
        eps = self.model.rms_norm_eps
        padding = cache.padding if cache else torch.zeros_like(following[:, 0])
        at = place(self.model, padding, cache.length if cache else 0, following.shape[1])
        embedded = rms_norm(F.embedding(following, self.embedding), self.embedding_norm, eps)
        x = F.linear(torch.cat([embedded, rms_norm(hidden, self.hidden_norm, eps)], dim=-1), self.projection)
        x = self.layer(x, at, 0, cache)
        if cache:
            cache.advance(following.shape[1])
        return rms_norm(x, self.norm, eps)
