"""Delayed scaling: scales follow from the amaxes before them as the rules say, products are of tensors rounded so."""

from collections import deque
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_joy.precision.delayed import DelayedScales, History, State, largest_of, updated
from megatron_joy.precision.emulation import Emulation, fp8_grouped, fp8_linear
from tests.precision import reference

TOP = {"e4m3": 448.0, "e5m2": 57344.0}
# Ordinary ones, none, infinite ones, a subnormal whose scale would be infinite, the largest.
AMAXES = [2.0, 8.0, 0.0, float("inf"), 0.7, 1e-42, 0.0, 3e38, 1.1, 0.3, 0.2, float("inf"), 0.0, 0.0, 5.0, 1e-42, 1e-42]


def table(amaxes: list[float], length: int, algorithm: str, top: float) -> list[np.float32]:
    """The scale after each amax, from the rules' text in numpy: a window of the newest `length`."""
    window, scale, scales = deque[float](maxlen=length), np.float32(1), []
    for amax in amaxes:
        window.append(amax)
        known = np.float32(amax if algorithm == "most_recent" else max(window))
        if 0 < known < np.inf:
            with np.errstate(over="ignore"):
                scale = min(np.float32(top) / known, np.finfo(np.float32).max)
        scales.append(scale)
    return scales


@pytest.mark.parametrize("fmt", TOP)
@pytest.mark.parametrize(
    ("length", "algorithm", "margin"), [(1, "most_recent", 0), (1, "max", 0), (3, "max", 0), (4, "max", 2)]
)
def test_scales_have_the_bits_of_the_table(
    length: int, algorithm: Literal["max", "most_recent"], margin: int, fmt: str
) -> None:
    columns = [AMAXES, AMAXES[::-1]]
    state, found = State(torch.ones(2), torch.zeros(length, 2)), []
    for amaxes in zip(*columns, strict=True):
        state.amaxes[0] = torch.tensor(amaxes)
        state = updated(state, TOP[fmt], History(length, algorithm, margin))
        assert state.amaxes[0].tolist() == [0.0, 0.0]
        found.append(state.scale.numpy())
    wanted = [table(column, length, algorithm, TOP[fmt] / 2**margin) for column in columns]
    np.testing.assert_array_equal(np.stack(found, 1), wanted)


def test_the_largest_magnitude_leaves_out_nan_and_keeps_infinity() -> None:
    assert float(largest_of(torch.tensor([[1.0, float("nan")], [-3.0, 2.0]]))) == 3.0
    assert float(largest_of(torch.tensor([float("-inf"), 1.0]).bfloat16())) == float("inf")
    assert float(largest_of(torch.zeros(0, 4))) == 0.0


def rounded(x: Tensor, scale: np.float32, fmt: str) -> NDArray[np.float64]:
    """float64 numbers behind the bytes of x under a scale."""
    bits = (4, 3, 7) if fmt == "e4m3" else (5, 2, 15)
    codes = [reference.encode(float(value), fmt) for value in (x.numpy() * scale).ravel()]
    signs = [-1 if code & 128 else 1 for code in codes]
    numbers = [sign * reference.decode(code & 127, *bits) for code, sign in zip(codes, signs, strict=True)]
    return np.array(numbers).reshape(x.shape) * np.float64(np.float32(1) / scale)


def move_on(scales: DelayedScales, emulation: Emulation, direction: str) -> None:
    state = getattr(scales, f"{direction}_state")
    assert emulation.history is not None
    for old, new in zip(
        state, updated(state, emulation.largest(direction == "forward"), emulation.history), strict=True
    ):
        old.copy_(new)


@pytest.mark.parametrize("gradients", ["hybrid", "e4m3"])
def test_each_pass_multiplies_what_the_amaxes_before_it_say(gradients: str) -> None:
    """Three micro-batches of one step: inputs' scales move on after each, the weight's stays that of the first."""
    emulation = Emulation("delayed", gradients, History(2, "max", 0))
    fmt = "e5m2" if gradients == "hybrid" else "e4m3"
    assert emulation.history is not None
    scales, random = DelayedScales(emulation.history), torch.Generator().manual_seed(1)
    weight = (torch.randn(24, 40, generator=random) / 10).requires_grad_()
    seen: dict[str, list[float]] = {"x": [], "grad": []}
    for size in (1.0, 50.0, 0.01):
        x = (size * torch.randn(16, 40, generator=random)).requires_grad_()
        grad = torch.randn(16, 24, generator=random) * size / 1e3
        weight.grad = None
        out = fp8_linear(x, weight, emulation, scales)
        move_on(scales, emulation, "forward")
        out.backward(grad)
        move_on(scales, emulation, "backward")
        of_x = table(seen["x"], 2, "max", TOP["e4m3"])[-1] if seen["x"] else np.float32(1)
        of_grad = table(seen["grad"], 2, "max", TOP[fmt])[-1] if seen["grad"] else np.float32(1)
        a, w, g = rounded(x.detach(), of_x, "e4m3"), rounded(weight.detach(), np.float32(1), "e4m3"), None
        g = rounded(grad, of_grad, fmt)
        for found, wanted in ((out.detach(), a @ w.T), (x.grad, g @ w), (weight.grad, g.T @ a)):
            assert found is not None
            np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
        seen["x"].append(float(x.detach().abs().max()))
        seen["grad"].append(float(grad.abs().max()))
    scales.first_micro_batch = True  # the next step rounds the weight with what its own amax gave
    top = np.float32(448) / np.float32(float(weight.detach().abs().max()))
    assert float(scales.of_weight(weight)) == float(top)


def test_grouped_experts_are_one_product_each_also_idle_ones() -> None:
    emulation, counts = Emulation("delayed", "hybrid", History(3, "max", 0)), [9, 0, 5, 16]
    assert emulation.history is not None
    together = DelayedScales(emulation.history, len(counts))
    alone = [DelayedScales(emulation.history) for _ in counts]
    random = torch.Generator().manual_seed(2)
    weight = torch.randn(len(counts), 32, 16, generator=random).requires_grad_()
    for _ in range(3):
        x = torch.randn(sum(counts), 16, generator=random)
        grad = torch.randn(sum(counts), 32, generator=random)
        out = fp8_grouped(x, weight, torch.tensor(counts).cumsum(0).int(), emulation, together)
        (gradient,) = torch.autograd.grad(out, weight, grad)
        for expert, (rows, above) in enumerate(zip(x.split(counts), grad.split(counts), strict=True)):
            single = weight[expert].detach().requires_grad_()
            one = fp8_linear(rows, single, emulation, alone[expert])
            torch.testing.assert_close(out.split(counts)[expert], one, rtol=1e-6, atol=1e-6)
            (of_one,) = torch.autograd.grad(one, single, above)
            torch.testing.assert_close(gradient[expert], of_one, rtol=1e-6, atol=1e-5)
        for scales in (together, *alone):
            scales.first_micro_batch = True
            move_on(scales, emulation, "forward")
            move_on(scales, emulation, "backward")
    assert together.scale_forward.tolist() == [s for scales in alone for s in scales.scale_forward.tolist()]
    assert together.amaxes_backward.tolist() == torch.cat([s.amaxes_backward for s in alone], 1).tolist()  # type: ignore[list-item]


def test_without_a_backward_pass_to_come_nothing_is_noted() -> None:
    emulation = Emulation("delayed", "hybrid", History(2, "max", 0))
    assert emulation.history is not None
    scales = DelayedScales(emulation.history)
    with torch.no_grad():
        fp8_linear(torch.ones(4, 16), torch.ones(16, 16), emulation, scales)
    assert not scales.amaxes_forward.any()  # type: ignore[operator]
