"""A linear model on hashed n-grams: logistic regression as fastText's classifiers use it, trained here in seconds.

Features of a text are the hashes of its words and pairs of words (dedup/words.py: any script, any case) modulo the size
of the weight table; each counts 1 however often it occurs, divided by the square root of their number. One kernel
(native/linear.c) finds them, for training and for scores. Training is AdaGrad over shuffled documents, one at a time,
seeded. A model is a folder: `model.json`, `weights.npy`, no pickle.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from data_pipeline.dedup.words import WORDS_A_BYTE, folding
from data_pipeline.native.library import kernels
from data_pipeline.score.base import Scores
from megatron_joy.data.atomic import atomic_file, write_atomically
from megatron_joy.errors import UserError

Places = npt.NDArray[np.uint32]
BITS = 18
GRAMS = (1, 2)
MODEL, WEIGHTS = "model.json", "weights.npy"


def features(text: str, bits: int) -> Places:
    """The places [features] of a text's words and pairs of words, ascending, each once."""
    content = text.encode()
    places = np.empty(min(2 * WORDS_A_BYTE * (len(content) + 1), 1 << bits), dtype=np.uint32)
    count = kernels().joy_places(content, len(content), *folding().addresses, bits, places.ctypes.data)
    if count < 0:
        raise MemoryError
    return np.sort(places[:count])


@dataclass(frozen=True)
class LinearScorer:
    """Chance, by the model, that a text is of the positive kind. weights: float32 [2 ** bits]."""

    name: str
    weights: npt.NDArray[np.float32]
    bias: float

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The model's name."""
        return (self.name,)

    @property
    def bits(self) -> int:
        """Binary logarithm of the table's size."""
        return len(self.weights).bit_length() - 1

    @cached_property
    def address(self) -> int:
        """For kernels: where the weights lie."""
        return self.weights.ctypes.data

    def __post_init__(self) -> None:
        """Raises ValueError for weights that kernels would read wrongly."""
        weights = self.weights
        plain = weights.dtype == np.float32 and weights.flags.c_contiguous and weights.ndim == 1
        if not (plain and 1 <= len(weights) <= 1 << 32):
            raise ValueError(f"weights are {weights.dtype} {list(weights.shape)}, expected float32 [2 ** bits]")

    def _sum(self, text: str) -> float:
        content, found = text.encode(), ctypes.c_double()
        if kernels().joy_linear(content, len(content), *folding().addresses, self.bits, self.address, found):
            raise MemoryError
        return found.value

    def chances(self, sums: npt.NDArray[np.float64]) -> Scores:
        """float32 from 0 to 1 of the sums of weights that kernels give."""
        return (1 / (1 + np.exp(-(sums + self.bias)))).astype(np.float32)

    def score(self, texts: Sequence[str]) -> Scores:
        """float32 [texts, 1] from 0 to 1."""
        return self.chances(np.array([self._sum(text) for text in texts], dtype=np.float64)).reshape(-1, 1)


def train_linear(
    name: str, positive: Sequence[str], negative: Sequence[str], epochs: int = 5, seed: int = 1, bits: int = BITS
) -> LinearScorer:
    """Train on texts of both kinds; each kind weighs the same. Raises UserError when a kind has no text."""
    good, bad = ([features(text, bits) for text in kind] for kind in (positive, negative))
    return train_on_features(name, good, bad, epochs, seed, bits)


def train_on_features(
    name: str, positive: Sequence[Places], negative: Sequence[Places], epochs: int = 5, seed: int = 1, bits: int = BITS
) -> LinearScorer:
    """The same, of texts whose features are known."""
    if not positive or not negative:
        raise UserError(
            f"training {name}: {len(positive)} positive and {len(negative)} negative texts; give both kinds"
        )
    rows = [*positive, *negative]
    labels = np.array([1.0] * len(positive) + [0.0] * len(negative))
    balance = np.where(labels > 0, len(rows) / (2 * len(positive)), len(rows) / (2 * len(negative)))
    weights, squares = np.zeros(1 << bits), np.full(1 << bits, 1e-8)
    bias, rng = 0.0, np.random.default_rng(seed)
    for _ in range(epochs):
        for number in rng.permutation(len(rows)).tolist():
            places = rows[number]
            scale = 1 / np.sqrt(max(1, len(places)))
            logit = weights[places].sum() * scale + bias
            error = (1 / (1 + np.exp(-logit)) - labels[number]) * balance[number]
            gradient = error * scale
            squares[places] += gradient**2
            weights[places] -= 0.1 * gradient / np.sqrt(squares[places])
            bias -= 0.01 * error
    return LinearScorer(name, weights.astype(np.float32), float(bias))


def save_linear(scorer: LinearScorer, folder: Path) -> None:
    """Write a model's folder; the description comes last."""
    with atomic_file(folder / WEIGHTS) as stream:
        np.save(stream, scorer.weights, allow_pickle=False)
    write_atomically(folder / MODEL, orjson.dumps({"name": scorer.name, "bias": scorer.bias, "grams": GRAMS}))


def load_linear(folder: Path, training: str = "data_pipeline.score.train") -> LinearScorer:
    """A model. Raises UserError when the folder holds none, and says which module would train one."""
    try:
        content = orjson.loads((folder / MODEL).read_bytes())
        weights = np.load(folder / WEIGHTS, allow_pickle=False)
        return LinearScorer(str(content["name"]), weights.astype(np.float32), float(content["bias"]))
    except (OSError, ValueError, KeyError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{folder}: no linear model ({cause}); train one: python -m {training}") from None
