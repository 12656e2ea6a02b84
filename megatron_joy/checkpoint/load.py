"""Reading a checkpoint back into a model and its optimizer, under any layout."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_joy.checkpoint.boxes import Boxes
from megatron_joy.checkpoint.contents import (
    FP8_PREFIX,
    OPTIMIZER_PREFIX,
    optimizer_boxes,
    optimizer_of,
    pieces_of,
    scale_boxes,
    set_updates_done,
    weight_boxes,
)
from megatron_joy.checkpoint.find import (
    Choice,
    Problem,
    being_read,
    candidates,
    file_problems,
    passed_over,
    read_candidate,
)
from megatron_joy.checkpoint.marker import Checkpoint
from megatron_joy.checkpoint.storage import LoadPlanner, Reader
from megatron_joy.checkpoint.together import RanksFailed, each, together
from megatron_joy.errors import UserError, WorkError
from megatron_joy.platform.process import Process

NAMED = 3  # keys that an error lists
SCALE_DIMENSIONS = 2  # of a tensor of FP8 scales; amaxes have the history as well


def choose(folder: Path, process: Process, unless: Callable[[Checkpoint], str | None] = lambda _: None) -> Choice:
    """The newest whole checkpoint under a run's `checkpoints`, the same on all ranks, which call this together.

    Every file's content is checked, each rank reading its share. `notes` has a line for each folder passed over.
    unless: why a checkpoint that may be whole is not to be taken, in words, or None.
    """
    notes: list[str] = []
    for path in together(lambda: candidates(folder) if process.is_first_rank else [])[0]:
        found = read_candidate(path)
        if isinstance(found, Checkpoint) and (reason := unless(found)):
            notes.append(f"checkpoint {path.name} is passed over: {reason}")
            continue
        shares = together(partial(_problems_in_share, found, process))
        problems = list(dict.fromkeys(problem for share in shares for problem in share))
        if isinstance(found, Checkpoint) and not problems:
            return Choice(found, tuple(notes))
        notes.append(passed_over(path, problems))
    return Choice(None, tuple(notes))


def _problems_in_share(found: Checkpoint | Problem, process: Process) -> list[Problem]:
    """What is wrong with every world-size-th file."""
    if isinstance(found, Problem):
        return [found]
    share = found.marker.files[process.info.rank :: process.info.world_size]
    return file_problems(found.path, share, full=True)


def load_checkpoint(
    checkpoint: Checkpoint, *, chunks: Sequence[Any], optimizer: Any | None, process: Process
) -> dict[str, Any]:
    """Fills this rank's model chunks and optimizer in place, whatever layout wrote them; all ranks call it together.

    `optimizer` None reads the weights alone. Returns the training loop's `state`. The optimizer's master weights,
    moments, delayed FP8 scales and count of updates become those that were saved, so the next step's bits are those of
    an unbroken run. Delayed scales that it hasn't (or of another history) begin anew: the recipe was changed.

    Raises UserError on all ranks, nothing changed, when the checkpoint and the model don't have the same tensors of the
    same shapes (the first keys are named) or it has no optimizer state; WorkError when a file can't be read, after
    which model and optimizer must not be used.
    """
    try:
        reader, wanted, named = each(lambda: _prepare(checkpoint, chunks, optimizer, process))
        _check_totality(checkpoint, reader, named, with_optimizer=optimizer is not None)
        together(lambda: _read(checkpoint, reader, _begin_anew(reader, wanted)))
    except RanksFailed as failure:
        raise WorkError(f"{checkpoint.path} could not be loaded: {failure}") from None
    if optimizer is not None:
        set_updates_done(optimizer, checkpoint.marker.optimizer_step or 0)
    return dict(checkpoint.state)


def _prepare(
    checkpoint: Checkpoint, chunks: Sequence[Any], optimizer: Any | None, process: Process
) -> tuple[Reader, dict[str, Boxes], dict[str, tuple[int, ...]]]:
    """(the reader, what this rank wants to have filled, shapes of the tensors that it would write).

    Between them all ranks would write each tensor; if each named all that it has, thousands would name the same.
    """
    reader = Reader(checkpoint)
    pieces = pieces_of(chunks, process)
    wanted, written = (weight_boxes(pieces, to_write, optimizer) for to_write in (False, True))
    if optimizer is not None:
        wanted |= optimizer_boxes(pieces, optimizer, to_write=False)
        written |= optimizer_boxes(pieces, optimizer, to_write=True)
        wanted |= scale_boxes(pieces, chunks, process, to_write=False)
    return reader, wanted, {key: tuple(boxes.shape) for key, boxes in written.items()}


def _begin_anew(reader: Reader, wanted: dict[str, Boxes]) -> dict[str, Boxes]:
    """What is left to be read, once delayed FP8 scales that the checkpoint lacks are those of no history."""
    left = {}
    for key, whole in wanted.items():
        stored = reader.tensors.get(key)
        if not key.startswith(FP8_PREFIX) or (stored is not None and tuple(stored.size) == tuple(whole.shape)):
            left[key] = whole
            continue
        for box in whole.boxes:
            box.data.fill_(1.0 if whole.dim() == SCALE_DIMENSIONS else 0.0)
    return left


def _check_totality(
    checkpoint: Checkpoint, reader: Reader, named: dict[str, tuple[int, ...]], with_optimizer: bool
) -> None:
    """Every tensor of the model is in the checkpoint with its shape, and the other way round."""
    if with_optimizer and checkpoint.marker.optimizer_step is None:
        raise UserError(f"{checkpoint.path} has weights only, no optimizer state: it can't be resumed from")
    shapes: dict[str, tuple[int, ...]] = {}
    for share in together(lambda: named):
        shapes |= share
    stored = {key: tuple(entry.size) for key, entry in reader.tensors.items() if not key.startswith(FP8_PREFIX)}
    if with_optimizer:
        _check_optimizer(checkpoint, optimizer_of(stored), optimizer_of(shapes))
    else:
        stored = {key: shape for key, shape in stored.items() if not key.startswith(OPTIMIZER_PREFIX)}
    differing = [
        f"{key} has shape {list(stored[key])}, the model's has {list(shapes[key])}"
        for key in sorted(shapes.keys() & stored.keys())
        if shapes[key] != stored[key]
    ]
    faults = [
        _listed("the model's {} missing in the checkpoint", sorted(shapes.keys() - stored.keys())),
        _listed("the checkpoint's {} unknown to the model", sorted(stored.keys() - shapes.keys())),
        _listed("of another shape: {}", differing),
    ]
    if any(faults):
        told = "; ".join(filter(None, faults))
        raise UserError(f"{checkpoint.path} is of another model: {told}; use the recipe in {checkpoint.recipe_path}")


def _check_optimizer(checkpoint: Checkpoint, stored: str | None, wanted: str | None) -> None:
    if stored != wanted:
        raise UserError(
            f'{checkpoint.path} has the state of optimizer.name = "{stored}", this run has "{wanted}"; '
            f'set optimizer.name = "{stored}" or start a new run.folder'
        )


def _listed(sentence: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return sentence.format(", ".join(items[:NAMED]) + more)


def _read(checkpoint: Checkpoint, reader: Reader, wanted: dict[str, Boxes]) -> None:
    with being_read(checkpoint), torch.no_grad(), warnings.catch_warnings():
        # Each rank reads its own pieces: that torch takes this for one process is what no_dist asks for.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(wanted, storage_reader=reader, planner=LoadPlanner(), no_dist=True)
