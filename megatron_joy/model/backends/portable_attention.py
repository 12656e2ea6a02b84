"""Block-diagonal causal attention in plain torch: one call per document, no mask is ever materialised for a row.

Letters: s row length, b rows, t = b*s packed tokens, n heads on this rank, d query/key width, e value width.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

WIDEST_HEAD = 256  # of flash attention's kernels in torch
CAUSAL = (-1, 0)  # positions before and after a query that it attends to: all, none


class _GatherSequence(torch.autograd.Function):
    """All-gathers dim 0 over a group; the backward pass reduce-scatters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        out = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(out, grad, group=ctx.group)
        return out, None


def zigzag_order(cp_size: int) -> list[int]:
    """Where chunk c of a row (of 2*cp equal chunks) lies once all ranks' halves are gathered in rank order.

    Context-parallel rank r holds chunks r and 2*cp-1-r (Megatron-core's balanced split of causal work).
    """
    held = [chunk for rank in range(cp_size) for chunk in (rank, 2 * cp_size - 1 - rank)]
    return [held.index(chunk) for chunk in range(2 * cp_size)]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention; the queries are the keys' last ones. q [l, n, d], k [m, n, d], v [m, n, e] -> [l, n, e]."""
    ql, kl = q.shape[0], k.shape[0]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, n, l, d]
    mask = None
    if ql != kl:
        mask = torch.ones(ql, kl, dtype=torch.bool, device=q.device).tril(kl - ql)
    width = v.shape[-1]
    if v.device.type == "cpu":
        # torch's CPU kernel goes block by block only where all widths are equal; else all scores are in memory at once.
        widest = max(width, q.shape[-1])
        q, k, v = (F.pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :width].squeeze(0).transpose(0, 1)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, borders: Sequence[int], scale: float) -> Tensor:
    """Attention inside each document. q [t, n, d], k [t, n, d], v [t, n, e], borders 0..t -> [t, n, e]."""
    # Split, not sliced: each slice's gradient would be a row of zeros as long as the whole.
    lengths = [end - start for start, end in pairwise(borders)]
    documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([attend(*document, scale) for document in documents])


def has_variable_length_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether `attend_variable_length` runs for such queries and values."""
    widest = max(q.shape[-1], v.shape[-1])
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and widest % 8 == 0 and widest <= WIDEST_HEAD


def attend_variable_length(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float) -> Tensor:
    """The same as `attend_packed` in one GPU kernel for all documents, whose borders stay on the device.

    q [t, n, d], k [t, n, d], v [t, n, e], borders int32 [documents + 1], longest: tokens of the longest -> [t, n, e].
    """
    width, widest = v.shape[-1], max(q.shape[-1], v.shape[-1])
    # The kernel has one width for all three.
    q, k, v = (F.pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
    out = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scale, window_size=CAUSAL)
    assert isinstance(out, Tensor)  # a pair only where more is asked for
    return out[..., :width]


def attend_chunk(q: Tensor, k: Tensor, v: Tensor, start: int, borders: Sequence[int], scale: float) -> Tensor:
    """Attention of the queries at positions [start, start + l) of a row whose documents begin at `borders`.

    q [l, n, d], k [s, n, d], v [s, n, e] -> [l, n, e].
    """
    end, outputs = start + q.shape[0], []
    for first, last in pairwise(borders):
        a, b = max(first, start), min(last, end)
        if a < b:
            outputs.append(attend(q[a - start : b - start], k[first:b], v[first:b], scale))
    return torch.cat(outputs)


class PortableAttention(torch.nn.Module):
    """Core attention on `scaled_dot_product_attention`; query/key and value widths may differ, as MLA's do.

    Megatron-core's own non-TE attention refuses both that and context parallelism. Documents come
    - without context parallelism as `packed_seq_params.cu_seqlens_q`, q [t, n, d];
    - with it as `attention_mask`, an int32 tensor of document borders in the flattened rows [b * s], q [s/cp, b, n, d]:
      MLA's rotary code would want each document padded to a multiple of 2*cp otherwise. Positions then count from the
      row's start; rotary attention inside a document depends on differences of positions only, so nothing else changes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float,
        pg_collection: Any,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.cp_group, self.scale = pg_collection.cp, softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> Tensor:
        """Returns [t, n * e] for packed input, else [s/cp, b, n * e]."""
        if packed_seq_params is not None:
            if has_variable_length_kernel(query, value):
                borders, longest = packed_seq_params.cu_seqlens_q, int(packed_seq_params.max_seqlen_q)
                return attend_variable_length(query, key, value, borders, longest, self.scale).flatten(1)
            borders = packed_seq_params.cu_seqlens_q.tolist()
            return attend_packed(query, key, value, borders, self.scale).flatten(1)
        return self._rows(query, key, value, attention_mask)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None) -> Tensor:
        cp = self.cp_group.size()
        if cp > 1:
            k, v = (self._natural_order(_GatherSequence.apply(x, self.cp_group), cp) for x in (k, v))
        s, b = k.shape[0], q.shape[1]
        flat = list(range(0, b * s + 1, s)) if borders is None else borders.tolist()
        rank = self.cp_group.rank()
        chunks = [0] if cp == 1 else [rank, 2 * cp - 1 - rank]
        length = q.shape[0] // len(chunks)
        rows = []
        for row in range(b):
            inside = [x - row * s for x in flat if row * s <= x <= (row + 1) * s]
            parts = [
                attend_chunk(
                    q[i * length : (i + 1) * length, row], k[:, row], v[:, row], chunk * length, inside, self.scale
                )
                for i, chunk in enumerate(chunks)
            ]
            rows.append(torch.cat(parts).flatten(1))
        return torch.stack(rows, dim=1)

    @staticmethod
    def _natural_order(x: Tensor, cp: int) -> Tensor:
        chunks = x.chunk(2 * cp, dim=0)
        return torch.cat([chunks[i] for i in zigzag_order(cp)], dim=0)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing is kept here."""
        return {}
