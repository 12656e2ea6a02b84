"""The text of a proof: synthetic samples as pure functions of (seed, index), with document borders of every kind."""

import numpy as np
import numpy.typing as npt

from megatron_joy.data.batch import Batch, make_batch
from megatron_joy.data.steps import BatchShape, micro_batch_indices
from megatron_joy.data.stream import Sample
from megatron_joy.recipe.schema import Recipe

EOD = 0
SURPRISE = 0.1  # share of tokens that don't follow from the one before


def _documents(random: np.random.Generator, kind: int, length: int) -> list[int]:
    """Lengths of a sample's documents, their eod included; they cover at least `length` tokens."""
    if kind == 0:  # no border at all
        return [length + 1]
    if kind == 1:  # many short ones, some of them nothing but an eod
        return [int(n) for n in random.integers(1, max(length // 6, 3), size=length)]
    if kind == 2:  # one border in the middle
        return [length // 2, length]
    return [int(n) for n in random.integers(2, length, size=length)]


def _text(random: np.random.Generator, length: int, vocabulary: int) -> npt.NDArray[np.int64]:
    """Tokens that mostly follow from the one before, so that there is something to learn; no eod among them."""
    surprises = random.integers(1, vocabulary, size=length)
    surprised = random.random(length) < SURPRISE
    surprised[:1] = True
    tokens = np.empty(length, dtype=np.int64)
    for i in range(length):
        tokens[i] = surprises[i] if surprised[i] else (5 * tokens[i - 1] + 3) % (vocabulary - 1) + 1
    return tokens


def sample(seed: int, index: int, length: int, vocabulary: int) -> Sample:
    """Sample `index`: length + 1 tokens. Of every four, one has no border, one many, one a border in the middle."""
    random = np.random.default_rng((seed, index))
    tokens = np.empty(0, dtype=np.int64)
    for size in _documents(random, index % 4, length + 1):
        tokens = np.concatenate([tokens, _text(random, size - 1, vocabulary), [EOD]])
        if len(tokens) > length:
            break
    return Sample(tokens[: length + 1], "synthetic", 0, index, 0, EOD)


def batches(recipe: Recipe, step: int, data_parallel_rank: int) -> list[Batch]:
    """A rank's micro-batches of step `step`, counted from 1."""
    train = recipe.train
    shape = BatchShape(train.global_batch_size, train.micro_batch_size, recipe.layout.data_parallel_size)
    length, vocabulary = recipe.data.sequence_length, recipe.model.vocab_size
    return [
        make_batch([sample(recipe.seed, k, length, vocabulary) for k in indices], recipe.data.document_mask, EOD)
        for indices in micro_batch_indices(step - 1, shape, data_parallel_rank)
    ]
