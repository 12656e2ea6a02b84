"""Initial weights as a pure function of (seed, parameter's name, expert): every layout starts from the same model.

Each rank draws a whole matrix from a generator seeded by its name and keeps its part: a few seconds for 48B parameters
over the ranks of a cluster, and no broadcast. Matrices are normal with the recipe's standard deviation, norms are ones.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories


def seed_of(seed: int, key: str, index: int = 0) -> int:
    """A 63-bit seed for one tensor (or one expert of it)."""
    digest = hashlib.blake2b(f"{seed}/{key}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _normal(shape: Sequence[int], std: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(tuple(shape), dtype=torch.float32).normal_(0.0, std, generator=generator)


def _sharded_tensors(chunks: Sequence[Any], groups: Any) -> Iterator[ShardedTensor]:
    for chunk in chunks:
        state = chunk.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        apply_factories(state)
        for entry in nested_values(state):
            if isinstance(entry, ShardedTensor) and entry.data is not None:
                yield entry


def initialize_parameters(chunks: Sequence[Any], seed: int, std: float, groups: Any) -> None:
    """Fills every parameter of the chunks in place; call under no_grad.

    Expert tensors have global shape [experts, out, in] and are drawn expert by expert; buffers (router bias, counters)
    keep the zeros they were made with.
    """
    buffers = {b.data_ptr() for chunk in chunks for b in chunk.buffers() if b.numel()}
    for entry in _sharded_tensors(chunks, groups):
        data = entry.data
        if data.data_ptr() in buffers:
            continue
        if len(entry.global_shape) == 1:
            data.fill_(1.0)
            continue
        # Transformer Engine has a tensor for each expert, without the axis of experts.
        local = (1,) * entry.prepend_axis_num + tuple(entry.local_shape)
        inside = tuple(slice(start, start + length) for start, length in zip(entry.global_offset, local, strict=True))
        if len(entry.global_shape) == 2:
            data.copy_(_normal(entry.global_shape, std, seed_of(seed, entry.key))[inside].reshape(data.shape))
            continue
        experts = data.view(-1, *local[-2:])
        for position in range(experts.shape[0]):
            expert = inside[0].start + position
            whole = _normal(entry.global_shape[1:], std, seed_of(seed, entry.key, expert))
            experts[position].copy_(whole[inside[1:]])
