"""GroupStepAdamW makes torch's AdamW updates with its state in FusedAdam's form."""

import pytest
import torch

from megatron_joy.platform.adamw import GroupStepAdamW

STEPS = 20


def parameters() -> list[torch.nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in ((7, 5), (5,), (3, 4, 2), (1000,))]


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, object]]:
    """Two groups of different decay, as the optimizer room makes them."""
    matrices, others = [p for p in params if p.dim() > 1], [p for p in params if p.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def test_twenty_updates_are_those_of_torch() -> None:
    ours, theirs = parameters(), parameters()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    mine, reference = GroupStepAdamW(groups(ours), **settings), torch.optim.AdamW(groups(theirs), **settings)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(1)
    for step in range(1, STEPS + 1):
        for group in (*mine.param_groups, *reference.param_groups):
            group["lr"] = 1e-2 * step / STEPS
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=random) * 10 ** float(torch.randn((), generator=random))
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine.state[a][key], reference.state[b][key], rtol=1e-6, atol=0)


def test_moments_in_bf16_are_those_of_an_update_in_fp32_rounded_when_put_back() -> None:
    ours, theirs = parameters(), parameters()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    mine = GroupStepAdamW(groups(ours), exp_avg_dtype=torch.bfloat16, **settings)  # type: ignore[arg-type]
    reference = torch.optim.AdamW(groups(theirs), **settings)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
        for state in reference.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].copy_(state[key].bfloat16())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        for key in ("exp_avg", "exp_avg_sq"):
            assert mine.state[a][key].dtype is torch.bfloat16
            torch.testing.assert_close(mine.state[a][key].float(), reference.state[b][key], rtol=0, atol=0)


def test_the_step_is_kept_by_group_and_counts_where_nothing_had_a_gradient() -> None:
    params = parameters()
    optimizer = GroupStepAdamW(groups(params))
    for param in params:
        if param.dim() > 1:
            param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [2, 2]
    assert all("step" not in state for state in optimizer.state.values())
    assert len(optimizer.state) == 2  # none for parameters without a gradient


def test_a_state_that_was_loaded_goes_on_as_if_never_saved() -> None:
    unbroken, resumed = parameters(), parameters()
    first, second = GroupStepAdamW(groups(unbroken), lr=1e-2), GroupStepAdamW(groups(resumed), lr=1e-2)
    random = torch.Generator().manual_seed(2)
    for step in range(6):
        for a, b in zip(unbroken, resumed, strict=True):
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad.clone()
        first.step()
        if step == 3:
            restored = GroupStepAdamW(groups(resumed), lr=1e-2)
            restored.load_state_dict(second.state_dict())
            second = restored
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(unbroken, resumed, strict=True))


def test_weight_decay_inside_the_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="decoupled"):
        GroupStepAdamW(parameters(), adam_w_mode=False)
