"""FP8 from the formats' definitions, in numpy and float64: nothing of torch, nothing of the code under test."""

import bisect
import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def decode(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """The number behind a byte, sign apart (OCP 8-bit floating point, sections 3 and 4); NaN where it has none."""
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    if exponent_bits == 4 and code == 0b1111111:
        return math.nan
    if exponent_bits == 5 and exponent == 31:
        return math.inf if mantissa == 0 else math.nan
    if exponent == 0:
        return float(math.ldexp(mantissa, 1 - bias - mantissa_bits))
    return float(math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits))


def _numbers(exponent_bits: int, mantissa_bits: int, bias: int) -> list[tuple[float, int]]:
    """All finite magnitudes with their bytes, from small to large."""
    every = [(decode(code, exponent_bits, mantissa_bits, bias), code) for code in range(128)]
    return sorted((number, code) for number, code in every if math.isfinite(number))


TABLES = {"e4m3": _numbers(4, 3, 7), "e5m2": _numbers(5, 2, 15)}


def encode(x: float, fmt: str) -> int:
    """The byte of the nearest number, of two equally near the one with an even mantissa; saturating."""
    numbers = TABLES[fmt]
    sign = 128 if math.copysign(1.0, x) < 0 else 0
    size = min(abs(x), numbers[-1][0])
    above = bisect.bisect_left(numbers, (size, -1))
    near = numbers[max(above - 1, 0) : above + 1]
    _, code = min(((abs(number - size), code & 1), code) for number, code in near)
    return sign | code


def scale_of(amax: np.float32, fmt: str, largest_input: float, scales: str) -> tuple[np.float32, np.float32]:
    """Scale and inverse by the rules' text (Transformer Engine, recipe_common.cuh; OCP MX 1.0, section 6.3)."""
    top = np.float32(TABLES[fmt][-1][0])
    if scales == "e8m0":
        wanted = float(np.float32(amax) * np.float32(1 / float(top)))
        exponent = -127 if wanted <= 2.0**-127 else math.ceil(math.log2(wanted))
        # log2 may be off by a rounding next to a power of two.
        exponent += wanted > 2.0**exponent
        exponent -= exponent > -127 and wanted <= 2.0 ** (exponent - 1)
        return np.float32(2.0**-exponent), np.float32(2.0**exponent)
    if amax == 0 or not np.isfinite(amax):
        return np.float32(1), np.float32(1)
    with np.errstate(over="ignore"):
        scale = np.float32(top / np.float32(amax))
    if np.isinf(scale):
        scale = np.float32(largest_input)
    if scales == "power_down":
        scale = np.float32(2.0 ** math.floor(math.log2(float(scale))))
    return scale, np.float32(1) / scale


def quantize(
    x: NDArray[np.float32], groups: NDArray[np.int64], fmt: str, largest_input: float, scales: str
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Bytes and inverse scales of the values of `x`, whose groups have the numbers in `groups`."""
    codes, inverse = np.zeros(x.shape, np.uint8), np.zeros(x.shape, np.float32)
    for group in np.unique(groups):
        inside = groups == group
        scale, inverted = scale_of(np.abs(x[inside]).max(), fmt, largest_input, scales)
        inverse[inside] = inverted
        with np.errstate(over="ignore"):
            codes[inside] = [encode(float(np.float32(value * scale)), fmt) for value in x[inside]]
    return codes, inverse
