"""Quantised bytes and scales equal those worked out from the formats' definitions, for every recipe and shape."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_joy.precision.scaling import (
    E4M3,
    E5M2,
    SCALINGS,
    Quantized,
    cast,
    quantize,
    quantize_weight,
    tile_lengths,
)
from tests.precision import reference

FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
DTYPES = [torch.float32, torch.bfloat16]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of all sizes: normal ones, tokens that are 1e-8 as large, zeros, huge ones, subnormals."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random)
    x *= torch.logspace(-8, 0, shape[-2]).unsqueeze(-1)
    x[..., 0, :] = 0.0
    x[..., 1, : shape[-1] // 2] = 3e38
    x[..., 2, :] = 1e-41 * torch.randn(shape[-1], generator=random)
    return x.to(dtype)


def assert_same(found: Quantized, x: Tensor, groups: NDArray[np.int64], fmt: str, scaling: str) -> None:
    limit = torch.finfo(torch.float32 if scaling == "tensorwise" else x.dtype).max
    codes, inverse = reference.quantize(x.float().numpy(), groups, fmt, limit, SCALINGS[scaling].scales)
    np.testing.assert_array_equal(found.scale_inv.numpy(), inverse)
    np.testing.assert_array_equal(found.values.contiguous().view(torch.uint8).numpy(), codes)


def row_groups(rows: int, columns: int, tile: int) -> NDArray[np.int64]:
    """One group for `tile` columns of each row."""
    return np.arange(rows)[:, None] * columns + np.arange(columns)[None, :] // tile


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_cast_gives_the_nearest_number_with_ties_to_even(fmt: str) -> None:
    numbers = [number for number, _ in reference.TABLES[fmt]]
    middles = [(a + b) / 2 for a, b in pairwise(numbers)]
    nearby = [m * (1 + sign * 2**-20) for m in middles for sign in (-1, 1)]
    x = np.array([*numbers, *middles, *nearby, numbers[-1] * 1.5, 3e38], np.float32)
    both = np.concatenate([x, -x])
    found = cast(torch.from_numpy(both), FORMATS[fmt]).view(torch.uint8).numpy()
    np.testing.assert_array_equal(found, [reference.encode(float(value), fmt) for value in both])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("scaling", ["blockwise", "mxfp8"])
def test_tiles_along_rows_have_the_bytes_and_scales_of_the_definition(
    scaling: str, fmt: str, dtype: torch.dtype
) -> None:
    x = values((6, 150), dtype, seed=1)
    found = quantize(x, FORMATS[fmt], SCALINGS[scaling], 1, [6])
    assert_same(found, x, row_groups(6, 150, SCALINGS[scaling].tile or 0), fmt, scaling)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaling", ["blockwise", "mxfp8"])
def test_tiles_along_tokens_begin_anew_at_each_expert(scaling: str, dtype: torch.dtype) -> None:
    parts, tile = [140, 0, 3, 57], SCALINGS[scaling].tile or 0
    x = values((200, 5), dtype, seed=2)
    numbers = np.repeat(np.arange(len(tile_lengths(parts, tile))), tile_lengths(parts, tile))
    found = quantize(x, E5M2, SCALINGS[scaling], 0, parts)
    assert_same(found, x, numbers[:, None] * 5 + np.arange(5)[None, :], "e5m2", scaling)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("contracted", [0, 1])
def test_a_whole_tensor_has_one_scale_and_each_expert_its_own(contracted: int, dtype: torch.dtype) -> None:
    x = values((30, 11), dtype, seed=3)
    assert_same(
        quantize(x, E4M3, SCALINGS["tensorwise"], contracted, [30]), x, np.zeros((30, 11), int), "e4m3", "tensorwise"
    )
    experts = np.repeat([0, 1, 2], [4, 20, 6])[:, None] + np.zeros((1, 11), int)
    found = quantize(x, E4M3, SCALINGS["tensorwise"], contracted, [4, 0, 20, 6])
    assert_same(found, x, experts, "e4m3", "tensorwise")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("contracted", [-1, -2])
@pytest.mark.parametrize("scaling", list(SCALINGS))
def test_weights_have_their_blocks_scales_each_expert_by_itself(
    scaling: str, contracted: int, dtype: torch.dtype
) -> None:
    n, k = 130, 140
    weight = values((2, n, k), dtype, seed=4)
    rows, columns = np.arange(n)[:, None], np.arange(k)[None, :]
    groups = {
        "tensorwise": np.zeros((n, k), int),
        "blockwise": rows // 128 * 10 + columns // 128,
        "mxfp8": rows * 10 + columns // 32 if contracted == -1 else rows // 32 * 1000 + columns,
    }[scaling]
    found = quantize_weight(weight, E4M3, SCALINGS[scaling], contracted)
    for expert in range(2):
        one = Quantized(found.values[expert], found.scale_inv[expert])
        assert_same(one, weight[expert], groups, "e4m3", scaling)


def test_an_unusable_largest_value_leaves_numbers_as_they_are() -> None:
    x = torch.tensor([[float("inf"), 1.0], [0.0, -0.0]])
    found = quantize(x, E4M3, SCALINGS["blockwise"], 1, [2])
    assert found.scale_inv.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert found.values.float().tolist() == [[448.0, 1.0], [0.0, -0.0]]


def test_no_tokens_are_no_error() -> None:
    for scaling in SCALINGS.values():
        assert quantize(torch.zeros(0, 4), E4M3, scaling, 0, [0, 0]).dequantized().shape == (0, 4)


def test_blocks_keep_small_tokens_that_one_scale_loses() -> None:
    """What finer groups are for: magnitudes of tokens spread over 1e-8..1."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(5)) * torch.logspace(-8, 0, 64).unsqueeze(1)
    lost = {
        name: float((quantize(x, E4M3, scaling, 1, [64]).dequantized() == 0).float().mean())
        for name, scaling in SCALINGS.items()
    }
    assert lost["tensorwise"] > 0.3
    assert lost["blockwise"] < 1e-3
    assert lost["mxfp8"] < 1e-3
