"""What a rank's memory is used for, in bytes."""

import resource
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_joy.optim.build import parts
from megatron_joy.train.step import Trainer

KINDS = ("parameters", "gradients", "optimizer", "peak")
KILOBYTE = 1024  # ru_maxrss on Linux


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages behind tensors, each once."""
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def _optimizer_tensors(trainer: Trainer) -> Iterator[Tensor]:
    """Masters, where weights are no fp32 numbers, and moments of this rank's shard."""
    for part in parts(trainer.optimizer):
        if getattr(part, "is_stub_optimizer", False):  # of a rank that has none of its parameters
            continue
        for group in part.shard_fp32_from_float16_groups:
            yield from (master for master in group if master is not None)
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())


def memory_of_rank(trainer: Trainer) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state, and the most that was ever in use.

    `peak` is what torch had allocated at most on a GPU, else the process's largest resident set (Python and libraries
    included).
    """
    buffers = [b for chunk in trainer.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    if trainer.process.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(trainer.process.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE
    return {
        "parameters": _bytes(buffer.param_data for buffer in buffers),
        "gradients": _bytes(buffer.grad_data for buffer in buffers),
        "optimizer": _bytes(_optimizer_tensors(trainer)),
        "peak": peak,
    }


def largest_memory(trainer: Trainer) -> dict[str, int]:
    """Of each kind the bytes on the rank that has most; a collective."""
    mine = memory_of_rank(trainer)
    numbers = torch.tensor([mine[kind] for kind in KINDS], dtype=torch.int64, device=trainer.process.device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return dict(zip(KINDS, numbers.tolist(), strict=True))
