"""Writing a checkpoint: into a hidden folder, every file synced and hashed, then the marker, then one rename.

A kill at any point leaves either the whole checkpoint or a hidden folder that nobody takes for one.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as write

import megatron_joy
from megatron_joy.checkpoint.contents import (
    megatron_object,
    optimizer_boxes,
    pieces_of,
    updates_done,
    weight_boxes,
    write_megatron_config,
)
from megatron_joy.checkpoint.find import latest, sha256_of
from megatron_joy.checkpoint.marker import (
    RECIPE,
    FileEntry,
    Marker,
    folder_name,
    replaced_name,
    unfinished_name,
    write_marker,
)
from megatron_joy.checkpoint.storage import SavePlanner, Writer
from megatron_joy.checkpoint.together import RanksFailed, each, one_line, together
from megatron_joy.errors import WorkError
from megatron_joy.platform.process import Process
from megatron_joy.recipe import Recipe, dump_recipe


@dataclass(frozen=True)
class _Save:
    """One save on this rank."""

    folder: Path
    step: int
    attempt: int
    recipe: Recipe
    process: Process

    @property
    def final(self) -> Path:
        return self.folder / folder_name(self.step)

    @property
    def partial(self) -> Path:
        return self.folder / unfinished_name(self.step, self.attempt)

    @property
    def aside(self) -> Path:
        return self.folder / replaced_name(self.step)


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    recipe: Recipe,
    chunks: Sequence[Any],
    optimizer: Any | None,
    process: Process,
    state: dict[str, Any],
    attempt: int = 0,
) -> Path:
    """Writes `folder`/step_XXXXXXXX; all ranks call it together with the same step, attempt and state.

    `chunks` are this rank's model chunks (in DDP wrappers or not), `optimizer` is Megatron-core's or None for weights
    only, `state` is JSON and comes back as it is. A checkpoint of the same step is replaced. Returns the folder, on all
    ranks, after it is safe on disk.

    Raises WorkError on all ranks, nothing half-written left behind, when any rank couldn't write (a full disk): the
    model and the optimizer in memory are untouched, so the caller may go on.
    """
    save = _Save(folder, step, attempt, recipe, process)
    try:
        together(lambda: _make_partial(save))
        tensors = each(lambda: _tensors(save, chunks, optimizer))
        updates = max(together(lambda: 0 if optimizer is None else updates_done(optimizer)))
        files = _write_tensors(save, tensors)
        together(lambda: _commit(save, files, None if optimizer is None else updates, state))
    except RanksFailed as failure:
        raise WorkError(_give_up(save, failure)) from None
    return save.final


def _make_partial(save: _Save) -> None:
    if save.process.is_first_rank:
        save.folder.mkdir(parents=True, exist_ok=True)
        if save.partial.exists():
            shutil.rmtree(save.partial)
        save.partial.mkdir()


def _tensors(save: _Save, chunks: Sequence[Any], optimizer: Any | None) -> dict[str, Any]:
    pieces = pieces_of(chunks, save.process)
    tensors: dict[str, Any] = dict(weight_boxes(pieces, to_write=True, optimizer=optimizer))
    if optimizer is not None:
        tensors |= optimizer_boxes(pieces, optimizer, to_write=True)
    if save.process.is_first_rank:
        tensors |= megatron_object(save.step)
    return tensors


def _write_tensors(save: _Save, tensors: dict[str, Any]) -> list[FileEntry]:
    """Every rank writes and hashes one file, rank 0 the index as well. Returns all files of all ranks."""
    writer = Writer(save.partial)
    try:
        write(tensors, storage_writer=writer, planner=SavePlanner())
    except CheckpointException as failure:  # torch raises it on all ranks
        # What the disk said is clearer than what torch made of it.
        said = together(lambda: one_line(writer.fs.error) if writer.fs.error else None)
        reasons = {rank: reason for rank, reason in enumerate(said) if reason is not None}
        raised = {rank: one_line(error) for rank, (error, _) in failure.failures.items()}
        raise RanksFailed(reasons or raised) from None
    written = together(lambda: list(writer.fs.files.values()))
    return [entry for entries in written for entry in entries]


def _commit(save: _Save, files: list[FileEntry], updates: int | None, state: dict[str, Any]) -> None:
    """On rank 0: the small files, the marker, the rename."""
    if not save.process.is_first_rank:
        return
    recipe = dump_recipe(save.recipe).encode()
    (save.partial / RECIPE).write_bytes(recipe)
    small = [save.partial / RECIPE, write_megatron_config(save.partial)]
    for path in small:
        sync(path)
    marker = Marker(
        step=save.step,
        attempt=save.attempt,
        time=time.time(),
        world_size=save.process.info.world_size,
        layout=save.recipe.layout.model_dump(),
        versions={
            "megatron_joy": megatron_joy.__version__,
            "megatron_core": version("megatron-core"),
            "torch": torch.__version__,
        },
        recipe_sha256=hashlib.sha256(recipe).hexdigest(),
        optimizer_step=updates,
        state=state,
        files=tuple(sorted([*files, *map(_entry, small)], key=lambda entry: entry.name)),
    )
    write_marker(save.partial, marker)
    sync(save.partial)
    _put_in_place(save)


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.name, path.stat().st_size, sha256_of(path))


def sync(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(save: _Save) -> None:
    """The rename that makes the checkpoint exist. One of the same step steps aside first and counts until then."""
    if save.final.exists():
        if save.aside.exists():
            shutil.rmtree(save.aside)
        save.final.rename(save.aside)
    save.partial.rename(save.final)
    sync(save.folder)
    if save.aside.exists():
        shutil.rmtree(save.aside)


def _give_up(save: _Save, failure: RanksFailed) -> str:
    """Removes what was written and says what is left; the same line on all ranks."""

    def clean() -> str:
        if not save.process.is_first_rank:
            return ""
        shutil.rmtree(save.partial, ignore_errors=True)
        whole = latest(save.folder).checkpoint
        return f"the last whole one is {whole.path.name}" if whole else "there is no whole one yet"

    left = together(clean)[0]
    return f"checkpoint of step {save.step} was not written to {save.folder}: {failure}; {left}"
