"""The linear model in plain Python, straight from its description: what the kernel must equal."""

import math

import numpy as np

from tests.data_pipeline.dedup.slow_minhash import shingles


def features(text: str, bits: int) -> list[int]:
    """The places of a text's words and pairs of words."""
    return sorted({value >> (64 - bits) for gram in (1, 2) for value in shingles(text, gram)})


def chance(text: str, weights: np.ndarray, bias: float) -> float:
    """The chance that a text is of the positive kind."""
    places = features(text, len(weights).bit_length() - 1)
    logit = math.fsum(weights[places].tolist()) / math.sqrt(max(1, len(places))) + bias
    return 1 / (1 + math.exp(-logit))
