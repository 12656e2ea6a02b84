"""Speculative decoding with the MTP layer: it drafts a few tokens, the model checks them all at once.

Only what the model itself would have written is kept, so the text is that of plain greedy decoding. (Checking several
tokens in one pass may round a logit differently than one at a time: two logits that agree to the last digits could
swap. In fp32 the tests have never met one.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_joy.errors import UserError
from megatron_joy.infer.cache import LatentCache
from megatron_joy.infer.decoder import Decoder, Predictor
from megatron_joy.infer.generate import Limits, check_prompts, new_tokens

MOST_DRAFTS = 3


@dataclass
class Acceptance:
    """How well drafting went. `length` is the mean number of tokens that one pass of the model gave (at least 1)."""

    passes: int = 0
    tokens: int = 0

    @property
    def length(self) -> float:
        """Tokens a pass, the prompt's pass not counted."""
        return self.tokens / self.passes if self.passes else 1.0


class _Draft:
    """The MTP layer with its cache: one entry for each token i whose successor is known."""

    def __init__(self, decoder: Decoder, predictor: Predictor, capacity: int) -> None:
        self.decoder, self.predictor = decoder, predictor
        no_padding = torch.zeros(1, dtype=torch.int64, device=decoder.device)
        self.cache: LatentCache = predictor.new_cache(no_padding, capacity)

    def __call__(self, hidden: Tensor, following: Tensor, drafts: int) -> list[int]:
        """Takes in tokens i (hidden [1, t, h]) and their successors [1, t]; then drafts on from the last one."""
        state = self.predictor(hidden, following, self.cache)[:, -1:]
        certain = self.cache.length
        tokens: list[int] = []
        while len(tokens) < drafts:
            tokens.append(int(self.decoder.logits(state)[0, -1].argmax()))
            if len(tokens) < drafts:
                state = self.predictor(state, torch.tensor([[tokens[-1]]], device=state.device), self.cache)
        self.cache.crop(certain)
        return tokens


@torch.inference_mode()
def generate_speculatively(
    decoder: Decoder, prompt: Sequence[int], limits: Limits, drafts: int, acceptance: Acceptance
) -> Iterator[int]:
    """Yields the tokens of greedy decoding of one prompt; `acceptance` is kept up to date.

    Raises UserError when the model has no MTP layer or for a number of drafts out of range.
    """
    check_prompts(decoder, [prompt])
    if decoder.predictor is None:
        raise UserError("--speculative: the model has no MTP layer (num_nextn_predict_layers is 0); leave it out")
    if not 1 <= drafts <= MOST_DRAFTS:
        raise UserError(f"--drafts {drafts}: expected 1 to {MOST_DRAFTS}")
    left = new_tokens(decoder, len(prompt), limits)
    room = len(prompt) + left + drafts
    cache = decoder.new_cache(torch.zeros(1, dtype=torch.int64, device=decoder.device), room)
    draft = _Draft(decoder, decoder.predictor, room)
    output = decoder.decode(torch.tensor([list(prompt)], device=decoder.device), cache)
    hidden, new = output.hidden, [int(output.logits[0, -1].argmax())]
    following = [*prompt[1:], *new]  # of the tokens behind `hidden`
    while True:
        for token in new:
            if token in limits.stop or left == 0:
                return
            yield token
            left -= 1
        guesses = draft(hidden, torch.tensor([following], device=decoder.device), drafts)
        hidden, new = _check(decoder, cache, new[-1], guesses)
        following = new
        acceptance.passes += 1
        acceptance.tokens += len(new)


def _check(decoder: Decoder, cache: LatentCache, last: int, guesses: list[int]) -> tuple[Tensor, list[int]]:
    """Runs the newest token and the guesses; returns hidden states of those kept, [1, a + 1, h], and the new tokens."""
    before = cache.length
    output = decoder.decode(torch.tensor([[last, *guesses]], device=decoder.device), cache)
    choices = output.logits[0].argmax(-1).tolist()
    accepted = 0
    while accepted < len(guesses) and guesses[accepted] == choices[accepted]:
        accepted += 1
    cache.crop(before + accepted + 1)
    return output.hidden[:, : accepted + 1], choices[: accepted + 1]
