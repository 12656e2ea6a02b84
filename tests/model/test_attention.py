"""Attention in its three forms (packed documents, rows, context-parallel chunks) against one dense masked softmax."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_joy.model.backends.portable_attention import PortableAttention
from tests.gloo import run_world

HEADS, QUERY_WIDTH, VALUE_WIDTH, SCALE = 3, 12, 8, 12**-0.5
ROWS, LENGTH = 3, 24
# Document borders of three rows of 24 tokens: none, several (one document of a single token), one in the middle.
BORDERS = [0, 24, 27, 28, 40, 48, 60, 72]


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k [s, b, n, d], v [s, b, n, e] and weights of the outputs [s, b, n * e], in fp64."""
    random = torch.Generator().manual_seed(0)
    widths = (QUERY_WIDTH, QUERY_WIDTH, VALUE_WIDTH)
    q, k, v = (
        torch.randn(LENGTH, ROWS, HEADS, width, generator=random, dtype=torch.float64).requires_grad_()
        for width in widths
    )
    return q, k, v, torch.randn(LENGTH, ROWS, HEADS * VALUE_WIDTH, generator=random, dtype=torch.float64)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax over a whole [s, s] mask per row: the same document, and not later."""
    document = torch.bucketize(torch.arange(ROWS * LENGTH), torch.tensor(BORDERS[1:-1]), right=True).view(ROWS, LENGTH)
    same = document[:, :, None] == document[:, None, :]
    seen = same & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) * SCALE
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,jbhe->ibhe", weights, v).flatten(2)  # [s, b, n * e]


def expected() -> tuple[Tensor, list[Tensor]]:
    """The dense output and the gradients of q, k and v."""
    q, k, v, weights = inputs()
    out = dense(q, k, v)
    (out * weights).sum().backward()
    return out.detach(), [x.grad for x in (q, k, v) if x.grad is not None]


def module(group: Any) -> PortableAttention:
    return PortableAttention(
        config=None,  # type: ignore[arg-type]
        layer_number=1,
        attn_mask_type=None,
        attention_type="self",
        softmax_scale=SCALE,
        pg_collection=SimpleNamespace(cp=group),
    )


LONELY = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def test_packed_documents_equal_the_dense_mask() -> None:
    q, k, v, weights = inputs()
    packed = [x.transpose(0, 1).reshape(ROWS * LENGTH, HEADS, -1) for x in (q, k, v)]  # [b * s, n, d]
    documents = SimpleNamespace(cu_seqlens_q=torch.tensor(BORDERS, dtype=torch.int32))
    out = module(LONELY)(*packed, None, packed_seq_params=documents)  # [b * s, n * e]
    out = out.view(ROWS, LENGTH, -1).transpose(0, 1)
    (out * weights).sum().backward()
    result, gradients = expected()
    torch.testing.assert_close(out, result, rtol=0, atol=1e-13)
    for x, gradient in zip((q, k, v), gradients, strict=True):
        torch.testing.assert_close(x.grad, gradient, rtol=0, atol=1e-13)


def test_rows_equal_the_dense_mask() -> None:
    q, k, v, weights = inputs()
    out = module(LONELY)(q, k, v, torch.tensor(BORDERS, dtype=torch.int32))
    (out * weights).sum().backward()
    result, gradients = expected()
    torch.testing.assert_close(out, result, rtol=0, atol=1e-13)
    for x, gradient in zip((q, k, v), gradients, strict=True):
        torch.testing.assert_close(x.grad, gradient, rtol=0, atol=1e-13)


def held(rank: int, size: int) -> Tensor:
    """Positions of a row that a context-parallel rank holds: chunk r and chunk 2 * size - 1 - r."""
    chunks = torch.arange(LENGTH).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def context_parallel_part() -> list[Any]:
    """This rank's output and gradients."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    mine = held(group.rank(), group.size())
    q, k, v, weights = inputs()
    local = [x.detach()[mine].clone().requires_grad_() for x in (q, k, v)]
    out = module(group)(*local, torch.tensor(BORDERS, dtype=torch.int32))
    (out * weights[mine]).sum().backward()
    dist.destroy_process_group()
    return [x.numpy() for x in (out.detach(), *(x.grad for x in local if x.grad is not None))]


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_chunks_equal_the_dense_mask(size: int) -> None:
    result, gradients = expected()
    for rank, part in enumerate(run_world(context_parallel_part, size)):
        mine = held(rank, size)
        for found, whole in zip(part, (result, *gradients), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), whole[mine], rtol=0, atol=1e-13)
