"""A folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_joy.data.atomic import partial_path
from megatron_joy.errors import UserError, WorkError


def refuse_existing(out: Path) -> None:
    """Raises UserError when `out` is a file or a folder with something in it."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: is there already and not empty; name a new folder, nothing is overwritten")


def refuse_full_disk(out: Path, needed: int) -> None:
    """Raises UserError when the disk that `out` will lie on has not `needed` bytes left."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{out}: needs {needed:,} bytes, the disk of {place} has {free:,} left; free some or move")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Gives a hidden folder beside `out` to write into; renamed to `out` when the block ends without an error.

    Raises UserError before anything is written when `out` is there, WorkError when the disk refuses. What was written
    up to an error is removed; after a kill it stays, hidden, and is never taken for a model.
    """
    refuse_existing(out)
    partial = partial_path(out.absolute())
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        os.replace(partial, out)
        _sync(out.absolute().parent)
    except OSError as error:
        raise WorkError(f"{out}: could not be written: {error.strerror or error}; nothing was left there") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
