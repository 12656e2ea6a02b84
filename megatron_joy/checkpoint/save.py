"""Writing a checkpoint: into a hidden folder, every file synced and hashed, then the marker, then one rename.

A kill at any point leaves either the whole checkpoint or a hidden folder that nobody takes for one. `background` does
the same beside training.
"""

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import megatron_joy
from megatron_joy.checkpoint.contents import (
    megatron_object,
    optimizer_boxes,
    pieces_of,
    scale_boxes,
    updates_done,
    weight_boxes,
    write_megatron_config,
)
from megatron_joy.checkpoint.find import entry_of, latest
from megatron_joy.checkpoint.marker import (
    RECIPE,
    FileEntry,
    Marker,
    folder_name,
    replaced_name,
    unfinished_name,
    write_marker,
)
from megatron_joy.checkpoint.together import RanksFailed, each, to_first, together
from megatron_joy.checkpoint.writing import Plan, Tensors, Written, agree, write_index, write_tensors
from megatron_joy.data.atomic import sync
from megatron_joy.errors import WorkError
from megatron_joy.platform.process import Process
from megatron_joy.recipe import Recipe, dump_recipe


@dataclass(frozen=True)
class Save:
    """One save, the same on all ranks. `state` is JSON and comes back as it is."""

    folder: Path
    step: int
    attempt: int
    recipe: Recipe
    process: Process
    state: dict[str, Any]

    @property
    def final(self) -> Path:
        """The checkpoint's folder."""
        return self.folder / folder_name(self.step)

    @property
    def partial(self) -> Path:
        """The hidden folder until then."""
        return self.folder / unfinished_name(self.step, self.attempt)

    @property
    def aside(self) -> Path:
        """Where an older checkpoint of the step waits for this one."""
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
    save = Save(folder, step, attempt, recipe, process, state)
    first = process.is_first_rank
    try:
        together(lambda: make_partial(save))
        tensors, updates = each(lambda: tensors_of(save, chunks, optimizer))
        updates = most(together(lambda: updates))
        plan = agree(save.partial, tensors, first)
        written = to_first(lambda: write_tensors(save.partial, plan, tensors, first))
        together(lambda: None if written is None else commit(save, plan, written, updates))
    except RanksFailed as failure:
        raise WorkError(give_up(save, failure)) from None
    return save.final


def make_partial(save: Save) -> None:
    """On rank 0: the empty hidden folder."""
    if save.process.is_first_rank:
        save.folder.mkdir(parents=True, exist_ok=True)
        if save.partial.exists():
            shutil.rmtree(save.partial)
        save.partial.mkdir()


def tensors_of(save: Save, chunks: Sequence[Any], optimizer: Any | None) -> tuple[Tensors, int | None]:
    """(what this rank writes, views of model and optimizer; updates done as this rank knows, None for weights only)."""
    pieces = pieces_of(chunks, save.process)
    tensors: Tensors = dict(weight_boxes(pieces, to_write=True, optimizer=optimizer))
    if optimizer is not None:
        tensors |= optimizer_boxes(pieces, optimizer, to_write=True)
        tensors |= scale_boxes(pieces, chunks, save.process, to_write=True)
    if save.process.is_first_rank:
        tensors |= megatron_object(save.step)
    return tensors, None if optimizer is None else updates_done(optimizer)


def most(updates: Sequence[int | None]) -> int | None:
    """Updates done: a rank without parameters knows of none."""
    return max((count for count in updates if count is not None), default=None)


def commit(save: Save, plan: Plan, written: Sequence[Written], updates: int | None) -> None:
    """On rank 0, in any thread: the index, the small files, the marker, the rename."""
    files = write_index(save.partial, plan, written)
    seal(
        save.partial,
        files,
        dump_recipe(save.recipe).encode(),
        step=save.step,
        attempt=save.attempt,
        world_size=save.process.info.world_size,
        layout=save.recipe.layout.model_dump(),
        optimizer_step=updates,
        state=save.state,
    )
    _put_in_place(save)


def seal(folder: Path, files: Sequence[FileEntry], recipe: bytes, **told: Any) -> None:
    """Makes a folder with tensors and their index a checkpoint: recipe, metadata.json and the marker, all synced.

    `told` is what the marker has beside files, time and versions.
    """
    (folder / RECIPE).write_bytes(recipe)
    small = [folder / RECIPE, write_megatron_config(folder)]
    for path in small:
        sync(path)
    marker = Marker(
        time=time.time(),
        versions={
            "megatron_joy": megatron_joy.__version__,
            "megatron_core": version("megatron-core"),
            "torch": torch.__version__,
        },
        recipe_sha256=hashlib.sha256(recipe).hexdigest(),
        files=tuple(sorted([*files, *map(entry_of, small)], key=lambda entry: entry.name)),
        **told,
    )
    write_marker(folder, marker)
    sync(folder)


def _put_in_place(save: Save) -> None:
    """The rename that makes the checkpoint exist. One of the same step steps aside first and counts until then."""
    if save.final.exists():
        if save.aside.exists():
            shutil.rmtree(save.aside)
        save.final.rename(save.aside)
    save.partial.rename(save.final)
    sync(save.folder)
    if save.aside.exists():
        shutil.rmtree(save.aside)


def give_up(save: Save, failure: RanksFailed) -> str:
    """Removes what was written and says what is left; the same line on all ranks."""

    def clean() -> str:
        if not save.process.is_first_rank:
            return ""
        shutil.rmtree(save.partial, ignore_errors=True)
        whole = latest(save.folder).checkpoint
        return f"the last whole one is {whole.path.name}" if whole else "there is no whole one yet"

    left = together(clean)[0]
    return f"checkpoint of step {save.step} was not written to {save.folder}: {failure}; {left}"
