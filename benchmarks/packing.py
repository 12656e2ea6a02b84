"""Attention inside documents against full causal attention over the packed row, forward and backward.

    python benchmarks/packing.py [--lengths 4096 32768] [--mean-document 1000] [--heads 2] [--repeats 3]

Head widths are JoyAI's (192 for queries and keys, 128 for values). Both go through torch's own kernel; the
packed one never materialises a mask. Both take turns. Prints medians, and the median and the quartiles of the pairs'
ratios, by the clock and of the CPU.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from shared.pairs import Seconds, compared, timed
from torch import Tensor

from megatron_joy.model.backends.portable_attention import attend, attend_packed

QUERY_WIDTH, VALUE_WIDTH = 192, 128

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def documents(length: int, mean: int, seed: int) -> list[int]:
    """Borders of documents with exponentially distributed lengths."""
    random = torch.Generator().manual_seed(seed)
    borders = [0]
    while borders[-1] < length:
        drawn = float(torch.empty(1).exponential_(1 / mean, generator=random))
        borders.append(min(length, borders[-1] + max(1, round(drawn))))
    return borders


def one_pass(attention: Attention, tensors: list[Tensor]) -> None:
    """Forward and backward."""
    attention(*tensors).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--mean-document", type=int, default=1000)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    scale = QUERY_WIDTH**-0.5
    for length in given.lengths:
        borders = documents(length, given.mean_document, seed=length)
        widths = (QUERY_WIDTH, QUERY_WIDTH, VALUE_WIDTH)
        tensors = [torch.randn(length, given.heads, width, requires_grad=True) for width in widths]
        forms: dict[str, Attention] = {
            "packed": lambda q, k, v, b=borders: attend_packed(q, k, v, b, scale),
            "full": lambda q, k, v: attend(q, k, v, scale),
        }
        taken: dict[str, list[Seconds]] = {name: [] for name in forms}
        for _ in range(given.repeats):
            for name, form in forms.items():
                taken[name].append(timed(partial(one_pass, form, tensors)))
        squares = sum((b - a) ** 2 for a, b in pairwise(borders))
        row = {
            "tokens": length,
            "documents": len(borders) - 1,
            **compared(taken["full"], taken["packed"], "full", "packed"),
            "by_arithmetic": round(length**2 / squares, 2),
            "threads": torch.get_num_threads(),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
