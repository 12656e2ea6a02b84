"""Files that appear whole or not at all: written beside their place, synced, then renamed into it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL_MARK = ".partial-"
_WRITEBACK = 32 << 20


def partial_path(path: Path) -> Path:
    """Where `path` is written until it is whole: hidden, in the same folder, its own for each process."""
    return path.with_name(f".{path.name}{PARTIAL_MARK}{os.getpid()}")


def commit_partial(partial: Path, path: Path) -> None:
    """Rename a whole, synced file into place. The rename itself survives a power cut: the folder is synced too."""
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class EarlyWriteback:
    """Has the kernel write a growing file to the disk while it grows, so that its sync at the end has little left.

    Left alone, it begins only when a tenth of the memory is waiting, and the sync waits for all of it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._waiting = descriptor, 0

    def __call__(self, size: int) -> None:
        """That many more bytes, anywhere, were given to the file."""
        self._waiting += size
        if self._waiting >= _WRITEBACK:
            # "Not needed" begins the writing of what has changed without waiting for it, and drops the rest.
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self._waiting = 0


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
