"""Choosing the next token from logits: the largest, or a draw with temperature, top-k and top-p from a seed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_joy.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature 0: always the largest logit. top_k 0 and top_p 1 leave nothing out."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for a value that has no meaning."""
        rules = {
            f"temperature {self.temperature}": (self.temperature >= 0, "0 or more"),
            f"top-k {self.top_k}": (self.top_k >= 0, "0 or more"),
            f"top-p {self.top_p}": (0 < self.top_p <= 1, "more than 0 and at most 1"),
        }
        wrong = [f"{name}: expected {expected}" for name, (holds, expected) in rules.items() if not holds]
        if wrong:
            raise UserError("; ".join(wrong))

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature == 0


class Sampler:
    """Draws from one generator, so that a seed gives the same text on the same machine."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.generator = torch.Generator(device).manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [b, v] -> ids [b]."""
        if self.sampling.greedy:
            return logits.argmax(-1)
        shares = nucleus(logits.float() / self.sampling.temperature, self.sampling.top_k, self.sampling.top_p)
        return torch.multinomial(shares, 1, generator=self.generator).squeeze(-1)


def nucleus(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities [b, v] over what is left: of the top_k largest (0: all), the fewest whose sum reaches top_p."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    shares, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = shares.cumsum(-1) - shares  # the sum of all larger ones; the largest is always kept
    kept = shares.masked_fill(before >= top_p, 0.0)
    kept = torch.zeros_like(kept).scatter(-1, order, kept)
    return kept / kept.sum(-1, keepdim=True)
