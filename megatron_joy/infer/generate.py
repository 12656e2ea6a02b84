"""Writing on from prompts, token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from megatron_joy.errors import UserError
from megatron_joy.infer.decoder import Decoder
from megatron_joy.infer.sampling import Sampler, Sampling

REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


@dataclass(frozen=True)
class Limits:
    """When to stop: after so many new tokens, or at one of these ids (which is not given out)."""

    max_new_tokens: int
    stop: tuple[int, ...] = ()


def check_prompts(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> None:
    """Raises UserError for a prompt that is empty, longer than the model is meant for, or of another vocabulary."""
    longest = decoder.model.max_position_embeddings
    for prompt in prompts:
        if not prompt:
            raise UserError("--prompt: has no tokens; give at least a word to go on from")
        if len(prompt) >= longest:
            raise UserError(f"--prompt: has {len(prompt)} tokens, the model takes {longest} with what it writes")
        if max(prompt) >= decoder.embedding.shape[0]:
            last = decoder.embedding.shape[0] - 1
            raise UserError(f"--prompt: has the token {max(prompt)}, the model's vocabulary ends at {last}")


def pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as one [b, t] tensor that all end in its last column, and how much of each row is padding, [b]."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    padding = [longest - len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(padding, device=device)


@torch.inference_mode()
def generate(
    decoder: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, limits: Limits
) -> Iterator[list[int | None]]:
    """Yields, step by step, the next token of each prompt; None for one that has stopped.

    Ends when all have, after max_new_tokens, or when the longest row reaches the model's longest sequence.
    """
    check_prompts(decoder, prompts)
    ids, padding = pad(prompts, decoder.device)
    steps = new_tokens(decoder, ids.shape[1], limits)
    cache = decoder.new_cache(padding, ids.shape[1] + steps)
    sampler = Sampler(sampling, decoder.device)
    going = [True] * len(prompts)
    for _ in range(steps):
        chosen = sampler(decoder.decode(ids, cache).logits[:, -1])
        tokens = chosen.tolist()
        going = [on and token not in limits.stop for on, token in zip(going, tokens, strict=True)]
        if not any(going):
            return
        yield [token if on else None for on, token in zip(going, tokens, strict=True)]
        ids = chosen[:, None]


def new_tokens(decoder: Decoder, prompt: int, limits: Limits) -> int:
    """How many tokens may follow a prompt of so many."""
    return min(limits.max_new_tokens, decoder.model.max_position_embeddings - prompt)


class TextStream:
    """Tokens in, text out as soon as it is certain (a character may take several tokens, also across the prompt)."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self.tokenizer, self.prompt = tokenizer, list(prompt)
        self._ids = list(prompt)
        self._given = len(self._decode().removesuffix(REPLACEMENT))

    def _decode(self) -> str:
        return self.tokenizer.decode(self._ids, skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The text that this token makes certain, perhaps none."""
        self._ids.append(token)
        text = self._decode()
        return "" if text.endswith(REPLACEMENT) else self._rest(text)

    def finish(self) -> str:
        """What is left, incomplete characters included."""
        return self._rest(self._decode())

    def _rest(self, text: str) -> str:
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new
