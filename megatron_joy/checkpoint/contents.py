"""What a checkpoint holds: weights, router biases and optimizer state, under names that no layout is part of.

Names are Megatron-core's: a weight has its sharded key, its optimizer state 'optimizer.state.<kind>.<sharded key>'
with kind 'exp_avg', 'exp_avg_sq' (AdamW), 'momentum_buffer' (Muon) and, where weights aren't fp32, 'param' for the fp32
master weight. Beside it are, of each product with delayed FP8 scaling, 'fp8_<direction>_scale' [experts, kinds] and
'fp8_<direction>_amaxes' [history, experts, kinds], under its weight's key; a dense weight is one expert. How many
optimizers are chained (for dense weights, for experts, by algorithm) leaves no trace. What belongs to no tensor, the
number of updates, is in the marker; learning rates and weight decay follow from the recipe.
"""

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_joy.checkpoint.boxes import Box, Boxes, Index, Piece, boxes_of_range
from megatron_joy.model.scales import states_of
from megatron_joy.optim.build import parts
from megatron_joy.optim.muon import BUFFER as MUON_BUFFER
from megatron_joy.platform.process import Process  # before Megatron-core, which it makes importable without a GPU

# isort: split
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.distributed import DistributedDataParallel

OPTIMIZER_PREFIX = "optimizer.state."
MASTER = "param"
FP8_PREFIX = f"{OPTIMIZER_PREFIX}fp8_"

Pieces = dict[int, tuple[Tensor, list[Piece]]]  # id of a local tensor -> the tensor and where its parts lie


def unwrapped(chunks: Sequence[Any]) -> list[Any]:
    """The models inside DDP wrappers, or the models as they are."""
    return [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in chunks]


def pieces_of(chunks: Sequence[Any], process: Process) -> Pieces:
    """Every tensor of this rank's model chunks and where it lies in its global tensor.

    Objects that Transformer Engine keeps beside weights ('_extra_state') are no part of a checkpoint: they hold FP8
    scales, and a checkpoint must load into a model that doesn't have them.
    """
    pieces: Pieces = {}
    for chunk in unwrapped(chunks):
        for entry in nested_values(chunk.sharded_state_dict(metadata={"dp_cp_group": process.groups.dp_cp})):
            if isinstance(entry, ShardedTensor | ShardedTensorFactory):
                pieces[id(entry.data)] = (entry.data, list(_pieces(entry)))
    return pieces


def _pieces(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[Piece]:
    """A sharded tensor is one piece; a factory (gate and up in one matrix) makes several views of its tensor."""
    whole = entry.data
    for part in nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]:
        if part.data.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            raise RuntimeError(f"{part.key}: Megatron-core gave a copy of a weight, not a part of it")
        low = _unravel(part.data.storage_offset() - whole.storage_offset(), tuple(whole.shape))
        yield Piece(
            key=part.key,
            global_shape=tuple(part.global_shape),
            offset=tuple(part.global_offset),
            low=low,
            shape=tuple(part.local_shape),
            replica=_three(part.replica_id),
        )


def _unravel(position: int, shape: Index) -> Index:
    index = []
    for i in range(len(shape)):
        row, position = divmod(position, math.prod(shape[i + 1 :]))
        index.append(row)
    return tuple(index)


def _three(replica: int | Sequence[int]) -> Index:
    """Which copy this is over pipeline stages, tensor-parallel and data-parallel ranks, as Megatron-core counts."""
    if isinstance(replica, int) or len(replica) != 3:
        raise RuntimeError(f"Megatron-core gave a replica id {replica!r} that isn't (pipeline, tensor, data)")
    return tuple(replica)


class _Collector:
    """Gathers boxes by key."""

    def __init__(self) -> None:
        self.boxes: dict[str, list[Box]] = defaultdict(list)
        self.shapes: dict[str, Index] = {}

    def add(self, key: str, piece: Piece, boxes: Sequence[Box]) -> None:
        if boxes:
            self.boxes[key].extend(boxes)
            self.shapes[key] = piece.global_shape

    def result(self) -> dict[str, Boxes]:
        return {key: Boxes(self.shapes[key], boxes) for key, boxes in self.boxes.items()}


def weight_boxes(pieces: Pieces, to_write: bool, optimizer: Any | None = None) -> dict[str, Boxes]:
    """The model's tensors; `to_write`: only what no other rank writes.

    Of a weight that data-parallel ranks have copies of, each writes the part whose optimizer state it keeps, so that
    all write equally much; without `optimizer` the first one writes all.
    """
    shares = _shares(optimizer) if to_write and optimizer is not None else {}
    collector = _Collector()
    for identity, (tensor, parts_of_tensor) in pieces.items():
        start, end = shares.get(identity, (0, tensor.numel()))
        flat = tensor.detach().view(-1)[start:end]
        for piece in parts_of_tensor:
            copies = piece.replica[:2] if identity in shares else piece.replica
            if not to_write or is_main_replica(copies):
                collector.add(piece.key, piece, boxes_of_range(piece, tuple(tensor.shape), start, end, flat))
    return collector.result()


def _shares(optimizer: Any) -> dict[int, tuple[int, int]]:
    """Id of every parameter that is updated -> the range of it that this rank keeps the state of, maybe empty."""
    shares: dict[int, tuple[int, int]] = {}
    for part in active_parts(optimizer):
        for buffer in part.buffers:
            shares |= dict.fromkeys(map(id, buffer.param_index_map), (0, 0))
        shares |= {id(param): (start, end) for param, start, end in owned_ranges(part)}
    return shares


def optimizer_boxes(pieces: Pieces, optimizer: Any, to_write: bool) -> dict[str, Boxes]:
    """The optimizer's tensors that this rank keeps (ZeRO-1); makes them, as zeros, where no step has yet."""
    collector = _Collector()
    for part in active_parts(optimizer):
        for param, start, end in owned_ranges(part):
            _, parts_of_param = pieces[id(param)]
            for kind, flat in _state_tensors(part, param).items():
                for piece in parts_of_param:
                    # The last number counts data-parallel copies, each of which keeps another range.
                    if not to_write or is_main_replica(piece.replica[:2]):
                        boxes = boxes_of_range(piece, tuple(param.shape), start, end, flat)
                        collector.add(f"{OPTIMIZER_PREFIX}{kind}.{piece.key}", piece, boxes)
    return collector.result()


def scale_boxes(pieces: Pieces, chunks: Sequence[Any], process: Process, to_write: bool) -> dict[str, Boxes]:
    """State of delayed FP8 scaling. Ranks of a pipeline stage have the same, but for experts that are spread."""
    groups, boxes = process.groups, dict[str, Boxes]()
    for product in (product for chunk in unwrapped(chunks) for product in states_of(chunk)):
        piece = pieces[id(product.weight)][1][0]
        routed = ".experts." in piece.key
        experts, first = (piece.global_shape[0], piece.offset[0]) if routed else (1, 0)
        copies = (groups.expt_tp, groups.expt_dp) if routed else (groups.tp, groups.dp_cp)
        if to_write and any(group.rank() for group in copies):
            continue
        for direction, state in product.by_direction.items():
            scale = state.scale.view(product.experts, -1)
            amaxes = state.amaxes.view(len(state.amaxes), product.experts, -1)
            key = f"{FP8_PREFIX}{direction}_{{}}.{piece.key}"
            shape = (experts, scale.shape[-1])
            boxes[key.format("scale")] = Boxes(shape, [Box((first, 0), scale)])
            boxes[key.format("amaxes")] = Boxes((len(amaxes), *shape), [Box((0, first, 0), amaxes)])
    return boxes


def optimizer_of(keys: Iterable[str]) -> str | None:
    """The `optimizer.name` whose state these tensors are; None for weights alone. Muon has AdamW for the rest."""
    own = [key for key in keys if key.startswith(OPTIMIZER_PREFIX) and not key.startswith(FP8_PREFIX)]
    kinds = {key.removeprefix(OPTIMIZER_PREFIX).partition(".")[0] for key in own}
    if not kinds:
        return None
    return "muon" if MUON_BUFFER in kinds else "adamw"


def active_parts(optimizer: Any) -> list[Any]:
    """The optimizers inside that have parameters on this rank."""
    return [part for part in parts(optimizer) if not getattr(part, "is_stub_optimizer", False)]


def owned_ranges(part: Any) -> Iterator[tuple[Tensor, int, int]]:
    """(parameter, start, end): the elements of its flattened local parameter whose state this rank keeps."""
    for ranges_by_dtype in part.gbuf_ranges:
        for buckets in ranges_by_dtype.values():
            for bucket in buckets:
                for param, ranges in bucket["param_map"].items():
                    yield param, ranges["param"].start, ranges["param"].end


def _state_tensors(part: Any, param: Tensor) -> dict[str, Tensor]:
    """Kind -> flat tensor of the owned range. A master weight that is the weight itself is left out."""
    group, position = part.model_param_group_index_map[param]
    main = part.optimizer.param_groups[group]["params"][position]
    state = part.optimizer.state[main]
    for kind in part.optimizer_state_keys:
        if kind not in state:
            state[kind] = torch.zeros_like(main, dtype=getattr(part.optimizer, "exp_avg_dtype", None))
    tensors = {kind: state[kind] for kind in part.optimizer_state_keys}
    if main.untyped_storage().data_ptr() != param.untyped_storage().data_ptr():
        tensors[MASTER] = main.detach()
    return tensors


def updates_done(optimizer: Any) -> int:
    """Updates made, as Adam's bias correction counts them; 0 on a rank without parameters."""
    return max(
        (int(g.get("step", 0)) for part in active_parts(optimizer) for g in part.optimizer.param_groups), default=0
    )


def set_updates_done(optimizer: Any, updates: int) -> None:
    """Puts the count back into every parameter group."""
    for part in active_parts(optimizer):
        for group in part.optimizer.param_groups:
            group["step"] = updates


def megatron_object(step: int) -> dict[str, io.BytesIO]:
    """The object, and `write_megatron_config` the file, without which Megatron-core's loader takes no folder.

    Ours reads neither.
    """
    content = io.BytesIO()
    torch.save([{"iteration": step}], content)
    return {ShardedObject("common_state", None, (1,), (0,)).unique_key: content}


def write_megatron_config(folder: Path) -> Path:
    """Writes metadata.json, which says that this is a distributed checkpoint in torch's format."""
    save_config(CheckpointingConfig("torch_dist"), str(folder))
    return folder / "metadata.json"
