"""The grouped experts against a loop over experts."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_joy.model.backends.portable_experts import PortableGroupedExperts
from megatron_joy.model.config import transformer_config
from megatron_joy.platform import process as platform
from tests.model.small import small_recipe

EXPERTS = 5


@pytest.fixture
def experts() -> Iterator[PortableGroupedExperts]:
    recipe = small_recipe(model={"n_routed_experts": EXPERTS})
    with platform.alone() as process:
        made = PortableGroupedExperts(EXPERTS, transformer_config(recipe), pg_collection=process.groups)
        random = torch.Generator().manual_seed(1)
        for weight in made.parameters():
            weight.data.normal_(0, 0.2, generator=random)
        yield made


def loop(module: PortableGroupedExperts, tokens: Tensor, counts: list[int], probs: Tensor) -> Tensor:
    """One expert after the other: w * down(silu(gate) * up)."""
    parts, start = [], 0
    for expert, count in enumerate(counts):
        x = tokens[start : start + count]
        gate, up = (x @ module.linear_fc1[expert].T).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ module.linear_fc2[expert].T
        parts.append(probs[start : start + count, None] * y)
        start += count
    return torch.cat(parts)


@pytest.mark.parametrize(
    "counts",
    [[4, 1, 7, 3, 2], [0, 6, 0, 5, 0], [0, 0, 0, 0, 9], [1, 0, 0, 0, 0]],
    ids=["all busy", "some idle", "one busy", "one token"],
)
def test_grouped_experts_equal_a_loop_over_experts(experts: PortableGroupedExperts, counts: list[int]) -> None:
    random = torch.Generator().manual_seed(2)
    total, hidden = sum(counts), experts.config.hidden_size
    tokens = torch.randn(total, hidden, generator=random)
    probs, weights = torch.rand(total, generator=random), torch.randn(total, hidden, generator=random)
    results = []
    for compute in (
        lambda x, p: experts(x, torch.tensor(counts), p)[0],
        lambda x, p: loop(experts, x, counts, p),
    ):
        experts.zero_grad()
        x, p = tokens.clone().requires_grad_(), probs.clone().requires_grad_()
        out = compute(x, p)
        (out * weights).sum().backward()
        results.append([out, x.grad, p.grad, experts.linear_fc1.grad, experts.linear_fc2.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    idle = [expert for expert, count in enumerate(counts) if count == 0]
    assert float(experts.linear_fc1.grad[idle].abs().sum()) == 0  # type: ignore[index]


def test_a_reduction_that_hands_back_an_expanded_gradient_is_served(experts: PortableGroupedExperts) -> None:
    tokens = torch.randn(6, experts.config.hidden_size, requires_grad=True)
    out, bias = experts(tokens, torch.tensor([2, 0, 1, 0, 3]), torch.ones(6))
    out.sum().backward()
    assert bias is None and tokens.grad is not None


def test_no_tokens_at_all_still_reach_every_input(experts: PortableGroupedExperts) -> None:
    tokens, probs = torch.zeros(0, experts.config.hidden_size, requires_grad=True), torch.zeros(0, requires_grad=True)
    out, _ = experts(tokens, torch.zeros(EXPERTS, dtype=torch.int64), probs)
    assert out.shape == tokens.shape
    out.sum().backward()
    for weight in experts.parameters():
        assert weight.grad is not None and not weight.grad.any()
    assert tokens.grad is not None and probs.grad is not None


@pytest.mark.parametrize(("ep", "etp", "tp", "replicated"), [(1, 1, 1, True), (2, 1, 1, False), (1, 1, 2, False)])
def test_gradients_of_experts_that_not_all_ranks_hold_are_marked(ep: int, etp: int, tp: int, replicated: bool) -> None:
    recipe = small_recipe()
    config = transformer_config(recipe)
    config.expert_model_parallel_size, config.expert_tensor_parallel_size = ep, etp
    config.tensor_model_parallel_size = tp
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups = SimpleNamespace(ep=group, expt_tp=group, expt_dp=group)
    made = PortableGroupedExperts(4, config, pg_collection=groups)
    assert {weight.allreduce for weight in made.parameters()} == {replicated}  # type: ignore[attr-defined]
