"""Files that appear whole or not at all: written beside their place, synced, then renamed into it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL_MARK = ".partial-"


def partial_path(path: Path) -> Path:
    """Where `path` is written until it is whole: hidden, in the same folder, its own for each process."""
    return path.with_name(f".{path.name}{PARTIAL_MARK}{os.getpid()}")


def commit_partial(partial: Path, path: Path) -> None:
    """Rename a whole, synced file into place. The rename itself survives a power cut: the folder is synced too."""
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for binary writing; it appears under its name only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        with open(partial, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        commit_partial(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` as the whole file `path`, atomically. Raises OSError as the disk does."""
    with atomic_file(path) as stream:
        stream.write(content)
