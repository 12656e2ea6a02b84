"""One micro-batch through the model: its inputs in the form each layout wants, and its loss."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_joy.data.batch import Batch, context_parallel_slice
from megatron_joy.model.mtp_loss import MTPTargets
from megatron_joy.platform.process import Process


@dataclass(frozen=True)
class MicroBatch:
    """A batch on its device together with the step's ratio of main to MTP targets."""

    batch: Batch
    mtp_weight: float


def model_inputs(batch: Batch, process: Process) -> dict[str, Any]:
    """Arguments of HybridModel.forward.

    Without context parallelism rows are packed into one of t = b * s tokens and documents are `PackedSeqParams`; with
    it this rank gets its two chunks of each row, [b, s / cp], and documents travel as `attention_mask`
    (see `PortableAttention`).
    """
    if process.groups.cp.size() > 1:
        return {"attention_mask": batch.cu_seqlens, "packed_seq_params": None}
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
    return {"attention_mask": None, "packed_seq_params": packed}


def local_batch(batch: Batch, process: Process) -> Batch:
    """This rank's part of a micro-batch, on its device: packed [1, b * s], or [b, s / cp] with context parallelism."""
    cp = process.groups.cp
    if cp.size() > 1:
        return context_parallel_slice(batch, cp.rank(), cp.size()).to(process.device)
    return batch.packed().to(process.device)


def loss_sums(mask: Tensor, targets: MTPTargets | None, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """losses [b, s] -> (sum of main losses for the backward pass, count of targets, sums to report)."""
    main = (losses.float() * mask).sum()
    report = {"main": main.detach()}
    if targets is not None and targets.loss_sum is not None:
        report["mtp"] = targets.loss_sum
    return main, mask.sum().to(torch.int), report


@contextmanager
def mtp_left_out(model: Any) -> Iterator[None]:
    """The chunk without its MTP layer, for the forward pass alone.

    When gradients are reduced the chunk must say again that it has one: Megatron-core then adds the gradients of both
    copies of the embedding, and would take the head's weight for the second copy otherwise.
    """
    chunk = unwrap_model(model)
    before, chunk.mtp_process = chunk.mtp_process, False
    try:
        yield
    finally:
        chunk.mtp_process = before


def forward_step(
    process: Process, with_mtp: bool, micro_batches: Iterator[MicroBatch], model: Any
) -> tuple[Tensor, Any]:
    """What Megatron-core's schedules call for each micro-batch on each pipeline chunk."""
    micro = next(micro_batches)
    batch = local_batch(micro.batch, process)
    targets = MTPTargets(batch.mtp_labels, batch.mtp_loss_mask, micro.mtp_weight) if with_mtp else None
    with nullcontext() if with_mtp else mtp_left_out(model):
        losses = model(
            batch.tokens, batch.position_ids, labels=batch.labels, loss_mask=targets, **model_inputs(batch, process)
        )
    return losses, partial(loss_sums, batch.loss_mask, targets)
