"""Drafts change how fast text comes, never which."""

import copy

import pytest
from torch import Tensor

from megatron_joy.errors import UserError
from megatron_joy.infer import speculative as room
from megatron_joy.infer.decoder import Decoder
from megatron_joy.infer.generate import Limits, generate
from megatron_joy.infer.sampling import Sampling
from megatron_joy.infer.speculative import Acceptance, generate_speculatively
from tests.infer.training import pattern

PROMPTS = [[12, 13, 14], [29], [3, 50, 7, 90, 11], [15, 16, 17, 22, 23, 24, 25]]


def greedy(decoder: Decoder, prompt: list[int], limits: Limits) -> list[int]:
    return [row[0] for row in generate(decoder, [prompt], Sampling(), limits) if row[0] is not None]


def speculative(decoder: Decoder, prompt: list[int], limits: Limits, drafts: int) -> tuple[list[int], Acceptance]:
    acceptance = Acceptance()
    return list(generate_speculatively(decoder, prompt, limits, drafts, acceptance)), acceptance


@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("model", ["decoder", "trained"])
def test_the_text_is_that_of_plain_greedy_decoding(model: str, drafts: int, request: pytest.FixtureRequest) -> None:
    made: Decoder = request.getfixturevalue(model)
    for prompt in PROMPTS:
        for limits in (Limits(1), Limits(2), Limits(40), Limits(1000), Limits(0)):
            assert speculative(made, prompt, limits, drafts)[0] == greedy(made, prompt, limits)


@pytest.mark.parametrize("drafts", [1, 3])
def test_the_text_ends_before_a_stop_token_wherever_it_falls(drafts: int, trained: Decoder) -> None:
    full = greedy(trained, PROMPTS[0], Limits(40))
    for stop in set(full[:8]):
        limits = Limits(40, (stop,))
        assert speculative(trained, PROMPTS[0], limits, drafts)[0] == full[: full.index(stop)]


def test_a_trained_mtp_layer_saves_passes(trained: Decoder) -> None:
    prompt = pattern(1, 12, seed=999)[0].tolist()
    one, three = (speculative(trained, prompt, Limits(48), drafts)[1] for drafts in (1, 3))
    assert 1.5 < one.length <= 2.0
    assert one.length < three.length <= 4.0
    assert one.passes < 48 / 1.5


def test_drafts_that_are_all_right_give_one_more_token_than_drafted_each_pass(
    trained: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, full = PROMPTS[0], greedy(trained, PROMPTS[0], Limits(61))
    known = 1 - len(prompt)  # tokens of `full` that the drafter has been told of: the prompt's own don't count

    def oracle(self: object, hidden: Tensor, following: Tensor, drafts: int) -> list[int]:
        nonlocal known
        known += following.shape[1]
        return full[known : known + drafts]

    monkeypatch.setattr(room._Draft, "__call__", oracle)
    tokens, acceptance = speculative(trained, prompt, Limits(30), 3)
    assert tokens == full[:30]
    assert acceptance.length == 4.0


def test_drafts_that_are_all_wrong_cost_nothing_but_time(trained: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room._Draft, "__call__", lambda self, hidden, following, drafts: [97] * drafts)
    tokens, acceptance = speculative(trained, PROMPTS[0], Limits(30), 2)
    assert tokens == greedy(trained, PROMPTS[0], Limits(30))
    assert acceptance.length == 1.0


def test_a_model_without_mtp_layer_is_refused(decoder: Decoder) -> None:
    bare = copy.copy(decoder)
    bare.predictor = None
    with pytest.raises(UserError, match="has no MTP layer"):
        speculative(bare, [1], Limits(1), 1)


@pytest.mark.parametrize("drafts", [0, 4])
def test_a_number_of_drafts_out_of_range_is_refused(drafts: int, decoder: Decoder) -> None:
    with pytest.raises(UserError, match=rf"--drafts {drafts}: expected 1 to 3"):
        speculative(decoder, [1], Limits(1), drafts)
