"""Bytes of parameters, gradients and optimizer state on each rank, exactly as the distributed optimizer allocates them.

Megatron-core lays the parameters of a chunk end to end in one buffer (one more for experts that have replicas of their
own): last registered first, each start on a multiple of 64 values, the end on one that all replicas and 128 divide.
Gradients have a buffer of the same length in fp32. Each data-parallel rank owns an equal range of it (ZeRO-1) and keeps
masters and moments of what parameters lie in that range, in fp32 (moments as the recipe says); of fp32 parameters the
masters are the parameters.

Muon's matrices have buffers of their own, in which no range ends inside a matrix (`parallel.placement`), one moment.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from megatron_joy.parallel.kinds import kind_of
from megatron_joy.parallel.placement import Item, Placement, newton_schulz_cost, place
from megatron_joy.parallel.tensors import MOE, Tensor, chunk_layers, chunk_tensors, chunks_of_stage
from megatron_joy.recipe.schema import Recipe

START, END = 64, 128  # values; megatron.core.optimizer.param_layout
FP32 = 4  # bytes
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
ROUTER_BUFFERS = 2  # of one fp32 value an expert: the bias and the count of tokens


@dataclass(frozen=True)
class States:
    """Bytes of one rank that live through the whole run."""

    parameters: int = 0
    gradients: int = 0
    masters: int = 0
    moments: int = 0
    router: int = 0

    def __add__(self, other: "States") -> "States":
        return States(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def optimizer(self) -> int:
        """Masters and moments."""
        return self.masters + self.moments

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer + self.router


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True)
class Bucket:
    """Parameters that lie end to end: their ranges, and the padded length, which all replicas share equally."""

    ranges: tuple[tuple[int, int], ...]
    length: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor], replicas: int, aligned_end: bool) -> "Bucket":
        """Lays tensors out in the given order; `aligned_end`: another bucket's first parameter follows."""
        ranges, end = [], 0
        for tensor in tensors:
            start = _round_up(end, START)
            end = start + tensor.numel
            ranges.append((start, end))
        end = _round_up(end, START) if aligned_end else end
        return cls(tuple(ranges), _round_up(end, math.lcm(replicas, END)))

    def owned(self, replicas: int) -> list[int]:
        """How many values each replica keeps optimizer state of, in the order of the replicas."""
        size = self.length // replicas
        counts = [0] * replicas
        for start, end in self.ranges:
            while start < end:
                replica = start // size
                stop = min(end, (replica + 1) * size)
                counts[replica] += stop - start
                start = stop
        return counts


@dataclass(frozen=True)
class Buffer:
    """The parameters of a chunk that share replicas: one bucket, and one of its own for a shared embedding."""

    buckets: tuple[Bucket, ...]
    replicas: int
    moments: int = 2

    @classmethod
    def of(cls, tensors: Sequence[Tensor], replicas: int) -> "Buffer":
        """Lays tensors out, the last one first."""
        groups: list[list[Tensor]] = [[]]
        for tensor in reversed(tensors):
            if tensor.shared and groups[-1]:
                groups.append([])
            groups[-1].append(tensor)
            if tensor.shared:
                groups.append([])
        filled = [group for group in groups if group]
        buckets = [Bucket.of(group, replicas, following is not None) for group, following in _with_next(filled)]
        return cls(tuple(buckets), replicas)

    @property
    def length(self) -> int:
        """Values, padding included."""
        return sum(bucket.length for bucket in self.buckets)

    def owned(self) -> list[int]:
        """How many values each replica keeps optimizer state of, in the order of the replicas."""
        return [sum(counts) for counts in zip(*(bucket.owned(self.replicas) for bucket in self.buckets), strict=True)]


@dataclass(frozen=True)
class MuonBuffer:
    """The matrices of a chunk that Muon has and that share replicas."""

    items: tuple[Item, ...]
    placement: Placement
    moments: int = 1

    @classmethod
    def of(cls, tensors: Sequence[Tensor], recipe: Recipe, replicas: int) -> "MuonBuffer":
        """Places the matrices of tensors, the last one first."""
        items = tuple(_item(tensor, recipe) for tensor in reversed(tensors))
        end = math.lcm(replicas, END)
        return cls(items, place(items, replicas, end // math.gcd(end, replicas)))

    @property
    def length(self) -> int:
        """Values, padding included."""
        return self.placement.share * len(self.placement.costs)

    def owned(self) -> list[int]:
        """How many values each replica keeps optimizer state of, in the order of the replicas."""
        ranges = [(start, start + item.elements) for start, item in zip(self.placement.starts, self.items, strict=True)]
        return Bucket(tuple(ranges), self.length).owned(len(self.placement.costs))


def _item(tensor: Tensor, recipe: Recipe) -> Item:
    """A tensor of Muon's as the matrices that this rank holds parts of; costs are those of whole matrices."""
    kind, layout = kind_of(tensor.name), recipe.layout
    rows, columns = tensor.shape[-2] // (2 if kind.gate_up else 1), tensor.shape[-1]
    stacked = ".mlp.experts." in tensor.name
    ranks = layout.expert_tensor_parallel_size if stacked else layout.tensor_model_parallel_size
    whole = rows * (ranks if kind.split == "rows" else 1), columns * (ranks if kind.split == "columns" else 1)
    count = tensor.numel // (rows * columns)
    return Item(count, rows * columns, count * newton_schulz_cost(*whole), kind.stacked)


def _with_next[T](items: Sequence[T]) -> list[tuple[T, T | None]]:
    return list(zip(items, [*items[1:], None], strict=True))


def replicas(recipe: Recipe, expert: bool) -> int:
    """Ranks that share the optimizer state of a parameter: DP x CP, or the replicas of an expert."""
    layout = recipe.layout
    if expert:
        return layout.expert_data_parallel_size
    return layout.data_parallel_size * layout.context_parallel_size


def buffers(recipe: Recipe, chunk: int) -> list[tuple[bool, Buffer | MuonBuffer]]:
    """(is it the experts' own, the buffer) of a chunk."""
    tensors = chunk_tensors(recipe, chunk)
    found: list[tuple[bool, Buffer | MuonBuffer]] = []
    for expert in (False, True):
        mine, shares = [tensor for tensor in tensors if tensor.expert is expert], replicas(recipe, expert)
        on_muon = [tensor for tensor in mine if _on_muon(recipe, tensor)]
        if flat := [tensor for tensor in mine if not _on_muon(recipe, tensor)]:
            found.append((expert, Buffer.of(flat, shares)))
        if on_muon:
            found.append((expert, MuonBuffer.of(on_muon, recipe, shares)))
    return found


def _on_muon(recipe: Recipe, tensor: Tensor) -> bool:
    return recipe.optimizer.name == "muon" and kind_of(tensor.name).optimizer == "muon"


def _chunk_states(recipe: Recipe, chunk: int, replica: dict[bool, int] | None) -> States:
    """With `replica` (by is-expert) one rank's bytes; without, those of the rank that owns most of each buffer."""
    width = WEIGHT_BYTES[recipe.precision.params_dtype]
    masters = 0 if width == FP32 else FP32
    moe = sum(part == MOE for part in chunk_layers(recipe, chunk))
    total = States(router=ROUTER_BUFFERS * FP32 * recipe.model.n_routed_experts * moe)
    for expert, buffer in buffers(recipe, chunk):
        counts = buffer.owned()
        owned = max(counts) if replica is None else counts[replica[expert]]
        moments = owned * buffer.moments * WEIGHT_BYTES[recipe.optimizer.moments_dtype]
        total += States(buffer.length * width, buffer.length * FP32, owned * masters, moments)
    return total


def _sum(states: Iterable[States]) -> States:
    total = States()
    for each in states:
        total += each
    return total


def stage_states(recipe: Recipe, stage: int) -> States:
    """Bytes of the rank of a pipeline stage that has most."""
    return _sum(_chunk_states(recipe, chunk, None) for chunk in chunks_of_stage(recipe, stage))


def rank_states(recipe: Recipe, rank: int) -> States:
    """Bytes of one rank of the world.

    Ranks are numbered TP first, then CP, DP, PP; experts ETP, EP, replicas, PP.
    """
    layout = recipe.layout
    ranks_of_stage = layout.world_size // layout.pipeline_model_parallel_size
    stage, inside = divmod(rank, ranks_of_stage)
    experts = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    replica = {False: inside // layout.tensor_model_parallel_size, True: inside // experts}
    return _sum(_chunk_states(recipe, chunk, replica) for chunk in chunks_of_stage(recipe, stage))
