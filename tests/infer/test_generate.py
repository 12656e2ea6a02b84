"""Greedy text is transformers' own; drawn text follows its seed and its limits; text comes out in whole characters."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from megatron_joy.errors import UserError
from megatron_joy.infer.decoder import Decoder
from megatron_joy.infer.generate import Limits, TextStream, generate
from megatron_joy.infer.sampling import Sampler, Sampling, nucleus

PROMPTS = [[5, 17, 40], [3], [9, 8, 7, 6, 5, 4, 3, 2, 1]]


def written(decoder: Decoder, prompts: list[list[int]], sampling: Sampling, limits: Limits) -> list[list[int]]:
    """The new tokens of each prompt."""
    rows = list(generate(decoder, prompts, sampling, limits))
    return [[token for row in rows if (token := row[i]) is not None] for i in range(len(prompts))]


@pytest.fixture(scope="module")
def expected(exported: Path) -> list[list[int]]:
    """What transformers' greedy `generate` adds, 25 tokens to each prompt, with its own cache."""
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, local_files_only=True).eval()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        new = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False, pad_token_id=0
        )
        found.append(new[0, len(prompt) :].tolist())
    return found


def test_greedy_text_is_transformers(decoder: Decoder, expected: list[list[int]]) -> None:
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert written(decoder, [prompt], Sampling(), Limits(25)) == [tokens]


def test_several_prompts_at_once_are_as_each_alone(decoder: Decoder, expected: list[list[int]]) -> None:
    assert written(decoder, PROMPTS, Sampling(), Limits(25)) == expected


def test_each_text_ends_before_its_stop_token(decoder: Decoder, expected: list[list[int]]) -> None:
    stop = expected[0][4]
    found = written(decoder, PROMPTS, Sampling(), Limits(25, (stop,)))
    for tokens, full in zip(found, expected, strict=True):
        assert tokens == (full[: full.index(stop)] if stop in full else full)


def test_text_ends_at_the_models_longest_sequence(decoder: Decoder) -> None:
    longest = decoder.model.max_position_embeddings
    assert len(written(decoder, [[1, 2, 3]], Sampling(), Limits(1000))[0]) == longest - 3


def test_no_token_is_written_when_none_is_asked_for(decoder: Decoder) -> None:
    assert written(decoder, [[1]], Sampling(), Limits(0)) == [[]]


def test_a_seed_draws_the_same_text_and_another_seed_another(decoder: Decoder) -> None:
    one, same, other = (
        written(decoder, [[1, 2]], Sampling(temperature=1.0, seed=seed), Limits(30)) for seed in (3, 3, 4)
    )
    assert one == same != other


def test_a_low_temperature_comes_close_to_greedy(decoder: Decoder, expected: list[list[int]]) -> None:
    assert written(decoder, [PROMPTS[0]], Sampling(temperature=1e-4), Limits(25)) == [expected[0]]


def test_top_k_leaves_the_largest_in_their_proportions() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    shares = nucleus(logits, top_k=2, top_p=1.0)
    assert shares[0, [0, 2]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(shares[0, [1, 3]], torch.tensor([3.0, 2.0]).softmax(0))


@pytest.mark.parametrize(("top_p", "kept"), [(0.1, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.95, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_make_up_the_share(top_p: float, kept: int) -> None:
    shares = nucleus(torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log(), top_k=0, top_p=top_p)
    assert (shares > 0).sum() == kept
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))
    assert shares[0].argmax() == 1


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(Sampling(temperature=2.0, seed=1), torch.device("cpu"))
    logits = torch.tensor([0.6, 0.3, 0.1]).log() * 2.0
    counts = sampler(logits.expand(20_000, 3)).bincount(minlength=3) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.6, 0.3, 0.1]), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("values", "match"),
    [({"temperature": -1.0}, "temperature -1.0"), ({"top_p": 0.0}, "top-p 0.0"), ({"top_k": -1}, "top-k -1")],
)
def test_a_sampling_without_meaning_is_refused(values: dict[str, float], match: str) -> None:
    with pytest.raises(UserError, match=match):
        Sampling(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "has no tokens"),
        (list(range(64)), "has 64 tokens, the model takes 64"),
        ([98], "has the token 98, .* ends at 97"),
    ],
)
def test_a_prompt_that_cannot_be_gone_on_from_is_refused(decoder: Decoder, prompt: list[int], match: str) -> None:
    with pytest.raises(UserError, match=match):
        written(decoder, [prompt], Sampling(), Limits(1))


@pytest.fixture
def bytes_tokenizer() -> Tokenizer:
    """One token per byte, so that most characters of most languages take several."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_text_comes_in_whole_characters_as_soon_as_they_are_whole(bytes_tokenizer: Tokenizer) -> None:
    stream = TextStream(bytes_tokenizer)
    parts = [stream.add(token) for token in bytes_tokenizer.encode("a é€😀 z").ids]
    assert parts == ["a", " ", "", "é", "", "", "€", "", "", "", "😀", " ", "z"]
    assert stream.finish() == ""


def test_a_character_that_the_prompt_begins_is_finished_by_the_text(bytes_tokenizer: Tokenizer) -> None:
    ids = bytes_tokenizer.encode("x€y").ids
    stream = TextStream(bytes_tokenizer, ids[:2])
    assert [stream.add(token) for token in ids[2:]] == ["", "€", "y"]


def test_what_is_cut_in_a_character_is_still_given_at_the_end(bytes_tokenizer: Tokenizer) -> None:
    stream = TextStream(bytes_tokenizer)
    for token in bytes_tokenizer.encode("ab€").ids[:3]:
        stream.add(token)
    assert stream.finish() == "\ufffd"
