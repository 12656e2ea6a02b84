"""The tensors' part of a save, in three steps that may lie apart in time.

All ranks agree who writes what, each rank writes its file, rank 0 writes the index of what was written. Only the first
step communicates. What is agreed holds for later saves of the same tensors.
"""

import dataclasses
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from megatron_joy.checkpoint.boxes import Boxes
from megatron_joy.checkpoint.marker import FileEntry
from megatron_joy.checkpoint.storage import SavePlanner, Writer
from megatron_joy.checkpoint.together import from_first, to_first

Tensors = dict[str, Any]  # key -> Boxes, or the bytes of an object


@dataclass(frozen=True)
class Plan:
    """What this rank writes and, on rank 0, the index without the places in files."""

    mine: SavePlan
    index: Metadata | None


@dataclass(frozen=True)
class Written:
    """What one rank has written: its files, and where in them each box lies."""

    files: tuple[FileEntry, ...]
    places: list[WriteResult]


def planner_of(tensors: Tensors, is_first_rank: bool) -> SavePlanner:
    """torch's view of what a rank writes."""
    planner = SavePlanner()
    planner.set_up_planner(tensors, is_coordinator=is_first_rank)
    return planner


def agree(folder: Path, tensors: Tensors, is_first_rank: bool) -> Plan:
    """All ranks together: checks that the boxes of all make whole tensors, and numbers the files.

    Raises RanksFailed on all ranks where they don't.
    """
    index: list[Metadata] = []
    local = to_first(lambda: planner_of(tensors, is_first_rank).create_local_plan())

    def join() -> list[SavePlan]:
        plans, metadata = planner_of(tensors, is_first_rank).create_global_plan(local or [])
        index.append(metadata)
        return Writer(folder).prepare_global_plan(plans)

    mine = from_first(join)
    return Plan(mine, index[0] if index else None)


def write_tensors(folder: Path, plan: Plan, tensors: Tensors, is_first_rank: bool) -> Written:
    """Writes, hashes and syncs this rank's file; no communication. Raises OSError as the disk does."""
    writer = Writer(folder)
    planner = planner_of(tensors, is_first_rank)
    planner.finish_plan(plan.mine)
    try:
        places = writer.write_data(plan.mine, planner).value()
    except Exception as error:
        raise (writer.fs.error or error) from None  # what the disk said is clearer than what torch made of it
    return Written(tuple(writer.fs.files.values()), places)


def write_alone(folder: Path, tensors: Tensors) -> list[FileEntry]:
    """Writes all tensors into one file, in a process by itself, each made (`LazyBoxes`) only when it is its turn.

    Returns the files, the index too; raises OSError as the disk does.
    """
    planner = planner_of(tensors, is_first_rank=True)
    (plan,), index = planner.create_global_plan([planner.create_local_plan()])
    return write_index(folder, Plan(plan, index), [write_streamed(folder, file_of_rank(0), plan, planner)])


def file_of_rank(rank: int) -> str:
    """What torch.distributed.checkpoint calls a rank's file."""
    return f"__{rank}_0.distcp"


def write_streamed(folder: Path, name: str, plan: SavePlan, planner: SavePlanner) -> Written:
    """Writes, hashes and syncs one file, with one item of the plan in memory at a time.

    torch's own writer keeps what it has written until its file is whole. Raises OSError as the disk does.
    """
    writer = Writer(folder)
    places = []
    try:
        with writer.fs.create_stream(folder / name, "wb") as stream:
            for item in plan.items:
                start, data = stream.tell(), planner.resolve_data(item)
                if isinstance(data, io.BytesIO):
                    stream.write(data.getbuffer())
                else:
                    torch.save(data, cast(IO[bytes], stream))
                length = stream.tell() - start
                places.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            stream.flush()
            os.fsync(stream.fileno())
    except RuntimeError as error:
        raise (writer.fs.error or error) from None  # what the disk said is clearer than what torch made of it
    return Written(tuple(writer.fs.files.values()), places)


def write_index(folder: Path, plan: Plan, written: Sequence[Written]) -> list[FileEntry]:
    """On rank 0: writes and syncs the index of all ranks' files. Returns all files, the index too."""
    if plan.index is None:
        raise RuntimeError("only rank 0 has the index")
    writer = Writer(folder)
    writer.finish(dataclasses.replace(plan.index), [one.places for one in written])
    return [*(entry for one in written for entry in one.files), *writer.fs.files.values()]


def outline(tensors: Tensors) -> dict[str, Any]:
    """What a plan and a file's layout depend on: of tensors shape, dtype and boxes, of objects their size."""
    return {
        key: (tuple(boxes.shape), boxes.dtype, [(box.offset, tuple(box.data.shape)) for box in boxes.boxes])
        if isinstance(boxes, Boxes)
        else boxes.getbuffer().nbytes
        for key, boxes in tensors.items()
    }
