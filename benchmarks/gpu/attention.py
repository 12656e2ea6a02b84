"""Attention inside packed documents on this GPU: one kernel a document, one for all, and Transformer Engine's.

    python benchmarks/gpu/attention.py [--out FILE]

JoyAI's 32 heads with queries and keys of 192 and values of 128, BF16, 4,096 and 32,768 tokens in documents of 256 to
2,048. Milliseconds of forward and backward together (median of 20), beside full causal attention over the row, and
output and gradients against the first way in fp32. Exit code 2 without a GPU.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_joy.platform import process  # noqa: F401 - before Megatron-core: one cuDNN for torch and Transformer Engine

# isort: split
from megatron_joy.model.backends.portable_attention import attend, attend_packed, attend_variable_length
from megatron_joy.model.backends.select import transformer_engine_problem

HEADS, QUERY, VALUE = 32, 192, 128
SCALE = QUERY**-0.5
LENGTHS = (4096, 32768)
REPEATS = 20


def borders_of(tokens: int) -> list[int]:
    """Documents of 256 to 2,048 tokens, the last one cut."""
    random, ends = np.random.default_rng(5), [0]
    while ends[-1] < tokens:
        ends.append(min(tokens, ends[-1] + int(random.integers(256, 2049))))
    return ends


def transformer_engine(borders: Tensor, longest: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Its attention as Megatron-core calls it for MLA: values padded to the queries' width."""
    engine = sys.modules["transformer_engine.pytorch"]
    core = engine.DotProductAttention(
        HEADS, QUERY, qkv_format="thd", attn_mask_type="padding_causal", softmax_scale=SCALE
    )

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths = {"cu_seqlens_q": borders, "cu_seqlens_kv": borders, "max_seqlen_q": longest, "max_seqlen_kv": longest}
        out: Tensor = core(q, k, F.pad(v, (0, QUERY - VALUE)), **lengths)
        return out.view(-1, HEADS, QUERY)[..., :VALUE]

    return run


def _gradients(run: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def milliseconds(run: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> float:
    """Median of forward and backward after three of them."""
    seconds = []
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    for _ in range(3 + REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.autograd.grad(run(*leaves), leaves, grad)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds[3:])


def compare(tokens: int) -> list[dict[str, Any]]:
    """A row for each way at one length."""
    cuts = borders_of(tokens)
    longest = max(b - a for a, b in itertools.pairwise(cuts))
    borders = torch.tensor(cuts, dtype=torch.int32, device="cuda")
    generator = torch.Generator("cuda").manual_seed(2)
    inputs = [
        torch.randn(tokens, HEADS, width, device="cuda", generator=generator).bfloat16()
        for width in (QUERY, QUERY, VALUE)
    ]
    grad = torch.randn(tokens, HEADS, VALUE, device="cuda", generator=generator).bfloat16()
    ways: dict[str, Callable[..., Tensor]] = {
        "a kernel for each document": lambda q, k, v: attend_packed(q, k, v, cuts, SCALE),
        "one kernel for all": lambda q, k, v: attend_variable_length(q, k, v, borders, longest, SCALE),
        "the row as one document": lambda q, k, v: attend(q, k, v, SCALE),
    }
    if transformer_engine_problem() is None:
        ways["Transformer Engine"] = transformer_engine(borders, longest)
    wanted = _gradients(ways["a kernel for each document"], [x.float() for x in inputs], grad.float())
    rows = []
    for name, run in ways.items():
        row: dict[str, Any] = {"tokens": tokens, "documents": len(cuts) - 1, "way": name}
        try:
            torch.cuda.reset_peak_memory_stats()
            row["milliseconds"] = milliseconds(run, inputs, grad)
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
            if name != "the row as one document":
                found = _gradients(run, inputs, grad)
                row["apart"] = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
        except Exception as error:  # a way that this GPU refuses must not hide the others
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> int:
    """Compares, prints and says how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("attention.py: no CUDA GPU to measure on", file=sys.stderr)
        return 2
    rows = []
    for tokens in LENGTHS:
        rows += compare(tokens)
        if arguments.out:
            result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
