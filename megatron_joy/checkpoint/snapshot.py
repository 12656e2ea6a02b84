"""Copies in host memory of what a rank writes, so that training may go on while they are on their way to disk."""

import torch
from torch import Tensor

from megatron_joy.checkpoint.boxes import Box, Boxes
from megatron_joy.checkpoint.writing import Tensors


class Snapshot:
    """Buffers of a rank's share of a checkpoint, made at the first `take` and used again by each later one.

    They are as large as the share is on disk; pinned where the tensors are a GPU's, whose copies then run at the speed
    of its bus.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def take(self, tensors: Tensors) -> Tensors:
        """Copies every box; the result holds until the next call. Returns when all elements are there."""
        taken = {
            key: Boxes(boxes.shape, [self._copy(key, i, box) for i, box in enumerate(boxes.boxes)])
            if isinstance(boxes, Boxes)
            else boxes
            for key, boxes in tensors.items()
        }
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return taken

    def _copy(self, key: str, number: int, box: Box) -> Box:
        data = box.data.detach()
        buffer = self._buffers.get((key, number))
        if buffer is None or buffer.shape != data.shape or buffer.dtype != data.dtype:
            buffer = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
            self._buffers[key, number] = buffer
        buffer.copy_(data, non_blocking=True)
        return Box(box.offset, buffer)
