"""Emulated products: forward, dgrad and wgrad are products of operands rounded along the contracted dimension."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_joy.precision.emulation import Emulation, fp8_grouped, fp8_linear
from megatron_joy.precision.scaling import SCALINGS
from tests.precision import reference

EMULATIONS = [Emulation(scaling, fmt) for scaling in SCALINGS for fmt in ("e4m3", "hybrid")]
TOKENS, INPUTS, OUTPUTS = 40, 144, 48


def rounded(x: Tensor, groups: np.ndarray, fmt: str, scaling: str) -> np.ndarray:
    """float64 numbers behind the reference's bytes."""
    codes, inverse = reference.quantize(x.numpy(), groups, fmt, 3.4e38, SCALINGS[scaling].scales)
    bits = (4, 3, 7) if fmt == "e4m3" else (5, 2, 15)
    table = np.array([reference.decode(code & 127, *bits) * (-1 if code & 128 else 1) for code in range(256)])
    return table[codes] * inverse.astype(np.float64)


def tiles(x: Tensor, axis: int, scaling: str, weight: bool) -> np.ndarray:
    """Group numbers for a product over `axis`, from the recipes' description."""
    rows, columns = np.arange(x.shape[0])[:, None], np.arange(x.shape[1])[None, :]
    if scaling == "tensorwise":
        return np.zeros(x.shape, int)
    if scaling == "blockwise" and weight:
        return rows // 128 * 1000 + columns // 128
    tile = {"blockwise": 128, "mxfp8": 32}[scaling]
    return rows * 1000 + columns // tile if axis == 1 else rows // tile * 1000 + columns


@pytest.mark.parametrize("emulation", EMULATIONS, ids=lambda e: f"{e.scaling}-{e.format}")
def test_the_three_products_are_those_of_rounded_operands(emulation: Emulation) -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, INPUTS, generator=random)
    weight = torch.randn(OUTPUTS, INPUTS, generator=random) / 10
    grad = torch.randn(TOKENS, OUTPUTS, generator=random) / 100
    x.requires_grad_()
    weight.requires_grad_()
    out = fp8_linear(x.unflatten(0, (4, 10)), weight, emulation).flatten(0, 1)
    out.backward(grad)
    scaling, fmt = emulation.scaling, "e5m2" if emulation.format == "hybrid" else "e4m3"
    a, w = x.detach(), weight.detach()
    expected = {
        "forward": (
            out.detach(),
            rounded(a, tiles(a, 1, scaling, False), "e4m3", scaling)
            @ rounded(w, tiles(w, 1, scaling, True), "e4m3", scaling).T,
        ),
        "dgrad": (
            x.grad,
            rounded(grad, tiles(grad, 1, scaling, False), fmt, scaling)
            @ rounded(w, tiles(w, 0, scaling, True), "e4m3", scaling),
        ),
        "wgrad": (
            weight.grad,
            rounded(grad, tiles(grad, 0, scaling, False), fmt, scaling).T
            @ rounded(a, tiles(a, 0, scaling, False), "e4m3", scaling),
        ),
    }
    for name, (found, wanted) in expected.items():
        assert found is not None
        np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=2e-6 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("emulation", EMULATIONS, ids=lambda e: f"{e.scaling}-{e.format}")
def test_grouped_experts_are_one_linear_each(emulation: Emulation) -> None:
    counts = [130, 0, 7, 23]
    random = torch.Generator().manual_seed(2)
    x = torch.randn(sum(counts), 32, generator=random)
    weight = torch.randn(len(counts), 64, 32, generator=random)
    grad = torch.randn(sum(counts), 64, generator=random)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    together, alone = [], []
    left, right = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = fp8_grouped(left, right, ends, emulation)
    out.backward(grad)
    together = [out.detach(), left.grad, right.grad]
    left, right = x.clone().requires_grad_(), weight.clone().requires_grad_()
    parts = [
        fp8_linear(rows, right[expert], emulation) for expert, rows in enumerate(left.split(counts)) if rows.shape[0]
    ]
    torch.cat(parts).backward(grad)
    alone = [torch.cat(parts).detach(), left.grad, right.grad]
    for found, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("scaling", list(SCALINGS))
def test_bf16_tensors_stay_bf16_and_are_near_the_exact_product(scaling: str) -> None:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(64, 256, generator=random).bfloat16().requires_grad_()
    weight = (torch.randn(128, 256, generator=random) / 16).bfloat16().requires_grad_()
    out = fp8_linear(x, weight, Emulation(scaling, "e4m3"))
    out.sum().backward()
    assert {out.dtype, x.grad.dtype, weight.grad.dtype} == {torch.bfloat16}  # type: ignore[union-attr]
    exact = x.detach().float() @ weight.detach().float().T
    error = float((out.detach().float() - exact).norm() / exact.norm())
    assert 0.01 < error < 0.06  # three mantissa bits, and no exact path by mistake
