"""From samples to the tensors of a micro-batch: labels, masks, positions, document borders; and a loader of them.

Letters: b rows (samples), s row length (tokens), cp context-parallel ranks.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from megatron_joy.data.stream import Sample, SampleStream

ROW_FIELDS = ("tokens", "labels", "loss_mask", "mtp_labels", "mtp_loss_mask", "position_ids")


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    tokens [b, s] int64; labels [b, s] int64: token t + 1; loss_mask [b, s] fp32: 0 where t + 1 is in another document;
    mtp_labels [b, s] int64: token t + 2, 0 where none was read; mtp_loss_mask [b, s] fp32: 0 where t + 2 is in another
    document or was not read; position_ids [b, s] int64: from 0 at each document and row; cu_seqlens [n + 1] int32: the
    borders of documents and rows in the b * s tokens, 0 and b * s included; max_seqlen: the longest of these n pieces.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    mtp_labels: Tensor
    mtp_loss_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @property
    def attended(self) -> int:
        """Pairs of a token and a position that it attends to, itself included: the sum of n (n + 1) / 2 over pieces."""
        lengths = self.cu_seqlens.long().diff()
        return int((lengths * (lengths + 1)).sum()) // 2

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self) if f.type is Tensor}
        return replace(self, **moved)

    def packed(self) -> "Batch":
        """The same tokens as one row: each [b, s] becomes [1, b * s]; borders count in those anyway."""
        return replace(self, **{name: getattr(self, name).reshape(1, -1) for name in ROW_FIELDS})


def make_batch(samples: Sequence[Sample], document_mask: bool, eod_id: int) -> Batch:
    """The micro-batch of samples of s + 1 tokens each, one a row.

    document_mask: documents neither attend to nor predict each other and positions restart in each (input position t
    and t + 1 are of one document if and only if tokens[t] is not eod_id). Without it a row is one long text.
    """
    text = torch.stack([torch.from_numpy(sample.tokens) for sample in samples])  # [b, s + 1]
    tokens, labels = text[:, :-1], text[:, 1:]  # [b, s]
    ends = (tokens == eod_id) if document_mask else torch.zeros_like(tokens, dtype=torch.bool)
    starts = torch.ones_like(ends)
    starts[:, 1:] = ends[:, :-1]
    row, length = tokens.shape
    place = torch.arange(row * length).view(row, length)
    began = torch.where(starts, place, 0).flatten().cummax(0).values.view(row, length)  # [b, s] where its piece begins
    borders = torch.cat([place[starts], torch.tensor([row * length])])  # [n + 1]
    mtp_labels, mtp_ok = torch.zeros_like(tokens), torch.zeros_like(ends)
    mtp_labels[:, :-1] = labels[:, 1:]
    mtp_ok[:, :-1] = ~(ends[:, :-1] | ends[:, 1:])
    return Batch(
        tokens=tokens.contiguous(),
        labels=labels.contiguous(),
        loss_mask=(~ends).float(),
        mtp_labels=mtp_labels,
        mtp_loss_mask=mtp_ok.float(),
        position_ids=place - began,
        cu_seqlens=borders.int(),
        max_seqlen=int(borders.diff().max()),
    )


def context_parallel_slice(batch: Batch, cp_rank: int, cp_size: int) -> Batch:
    """This rank's part of every row: chunks cp_rank and 2 * cp - 1 - cp_rank of 2 * cp equal ones, [b, s / cp].

    The early chunk of a rank has little to attend to and its late one much: all ranks do the same causal work
    (Megatron-core's `get_batch_on_this_cp_rank` deals alike). cu_seqlens stay those of the full rows, since attention
    gathers the keys of all ranks. Raises ValueError where s is no multiple of 2 * cp.
    """
    if cp_size == 1:
        return batch
    length = batch.tokens.shape[1]
    if length % (2 * cp_size):
        raise ValueError(f"rows of {length} tokens do not split into 2 x {cp_size} chunks")
    chunk = torch.arange(length, device=batch.tokens.device).view(2 * cp_size, -1)
    held = torch.cat([chunk[cp_rank], chunk[2 * cp_size - 1 - cp_rank]])
    return replace(batch, **{name: getattr(batch, name).index_select(1, held) for name in ROW_FIELDS})


class BatchLoader:
    """The micro-batches of each step for one data-parallel rank, made ahead of time in a thread.

    Iterating gives for steps first_step, first_step + 1, ... (from 0; up to, not with, last_step where given) the
    list of the step's `Batch`es, whose samples `deal` names (of `data.steps`). What it gives depends on the step
    alone, so resuming takes one integer. An error while reading is raised in the consumer, at the step that it
    belongs to. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        stream: SampleStream,
        deal: Callable[[int], Sequence[Sequence[int]]],
        document_mask: bool,
        first_step: int = 0,
        last_step: int | None = None,
        ahead: int = 2,
    ) -> None:
        self._stream, self._deal, self._mask = stream, deal, document_mask
        self._first, self._last = first_step, last_step
        if last_step is None or first_step < last_step:
            deal(first_step)  # a shape that does not divide fails here
        self._queue: queue.Queue[list[Batch] | BaseException | None] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="batch-loader", daemon=True)
        self._thread.start()

    def _batches(self, step: int) -> list[Batch]:
        return [
            make_batch([self._stream.sample(k) for k in samples], self._mask, self._stream.eod_id)
            for samples in self._deal(step)
        ]

    def _work(self) -> None:
        step = self._first
        try:
            while self._last is None or step < self._last:
                if not self._put(self._batches(step)):
                    return
                step += 1
            self._put(None)
        except BaseException as error:  # whatever it is, the consumer must see it rather than wait for ever
            self._put(error)

    def _put(self, item: list[Batch] | BaseException | None) -> bool:
        """Waits for room in the queue; False when the loader was closed instead."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._ended or self._closed.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, list):
            return item
        self._ended = True
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stops the thread and waits for it; the stream stays open. May be called twice."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
