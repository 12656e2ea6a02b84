"""All local experts as one grouped product each way, against a loop over experts with the same weights.

    python benchmarks/experts.py [--experts 64] [--tokens 1024] [--repeats 5]

Widths are JoyAI's (hidden 2048, expert width 768, top-8); forward and backward in fp32. Both take turns, so that a
drifting machine touches both alike. Prints medians, the median and the quartiles of the pairs' ratios, by the clock and
of the CPU, and the largest difference of the outputs.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from shared.pairs import Seconds, compared, timed
from torch import Tensor

HIDDEN, WIDTH, TOP_K = 2048, 768, 8

Form = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]


def grouped(x: Tensor, fc1: Tensor, fc2: Tensor, counts: list[int]) -> Tensor:
    """What `PortableGroupedExperts` computes, routing weights left out."""
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x, fc1.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, fc2.transpose(1, 2), offs=ends)


def loop(x: Tensor, fc1: Tensor, fc2: Tensor, counts: list[int]) -> Tensor:
    """One expert after the other."""
    parts = []
    # unbind: indexing would give each expert a whole stack of zeros as its gradient.
    for rows, first, second in zip(x.split(counts), fc1.unbind(), fc2.unbind(), strict=True):
        gate, up = F.linear(rows, first).chunk(2, dim=-1)
        parts.append(F.linear(F.silu(gate) * up, second))
    return torch.cat(parts)


def one_pass(form: Form, tensors: tuple[Tensor, Tensor, Tensor], counts: list[int]) -> None:
    """Forward and backward."""
    for tensor in tensors:
        tensor.grad = None
    out = form(*tensors, counts)
    out.backward(torch.ones_like(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    random = torch.Generator().manual_seed(0)
    routed = torch.randint(given.experts, (given.tokens * TOP_K,), generator=random)
    counts = routed.bincount(minlength=given.experts).tolist()
    x = torch.randn(len(routed), HIDDEN, generator=random).requires_grad_()
    fc1 = (torch.randn(given.experts, 2 * WIDTH, HIDDEN, generator=random) / 45).requires_grad_()
    fc2 = (torch.randn(given.experts, HIDDEN, WIDTH, generator=random) / 28).requires_grad_()
    with torch.no_grad():
        difference = float((grouped(x, fc1, fc2, counts) - loop(x, fc1, fc2, counts)).abs().max())
    forms: dict[str, Form] = {"grouped": grouped, "loop": loop}
    taken: dict[str, list[Seconds]] = {name: [] for name in forms}
    for _ in range(given.repeats):
        for name, form in forms.items():
            taken[name].append(timed(partial(one_pass, form, (x, fc1, fc2), counts)))
    row = {
        "experts": given.experts,
        "routed_tokens": len(routed),
        **compared(taken["loop"], taken["grouped"], "loop", "grouped"),
        "largest_difference": difference,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
