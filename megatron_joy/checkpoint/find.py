"""Which folders are whole checkpoints, found without torch: the newest one that holds is the one to go on from."""

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_joy.checkpoint.marker import MARKER, Checkpoint, FileEntry, MarkerProblem, read_marker, step_of
from megatron_joy.data.checksum import Progress, file_blake3
from megatron_joy.errors import UserError

_READERS = min(4, len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file of a checkpoint."""

    file: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True)
class Choice:
    """The newest whole checkpoint, or None, and one line for each newer folder that was passed over."""

    checkpoint: Checkpoint | None
    notes: tuple[str, ...] = ()


def candidates(folder: Path) -> list[Path]:
    """Folders named like checkpoints, newest first, whole or not."""
    if not folder.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        step = step_of(path.name)
        if step is not None and path.is_dir():
            found[step] = path  # ".step_N.replaced" sorts before "step_N", which wins
    return [found[step] for step in sorted(found, reverse=True)]


def entry_of(path: Path) -> FileEntry:
    """A file as it is now, for a marker."""
    return FileEntry(path.name, path.stat().st_size, file_blake3(path))


def _silent(_: int) -> None:
    pass


def file_problem(folder: Path, entry: FileEntry, full: bool, progress: Progress = _silent) -> Problem | None:
    """What is wrong with a file: absent, of another size and, with `full`, of another content."""
    path = folder / entry.name
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return Problem(entry.name, f"{entry.bytes} bytes", f"{size} bytes")
        if full and (found := file_blake3(path, progress)) != entry.blake3:
            return Problem(entry.name, f"blake3 {entry.blake3}", f"blake3 {found}")
    except FileNotFoundError:
        return Problem(entry.name, f"{entry.bytes} bytes", "no such file")
    except OSError as error:
        return Problem(entry.name, f"{entry.bytes} bytes", f"unreadable ({error.strerror})")
    return None


def file_problems(
    folder: Path, entries: Iterable[FileEntry], full: bool, progress: Progress = _silent
) -> list[Problem]:
    """What is wrong with these files, several looked at at the same time."""
    with ThreadPoolExecutor(_READERS) as pool:  # hashing and reading need no interpreter
        found = pool.map(lambda entry: file_problem(folder, entry, full, progress), entries)
        return [problem for problem in found if problem is not None]


def read_candidate(path: Path) -> Checkpoint | Problem:
    """The checkpoint in a folder as its marker tells it, its files not looked at, or why the marker doesn't hold."""
    try:
        marker = read_marker(path)
    except MarkerProblem as problem:
        return Problem(MARKER, "a whole marker", str(problem))
    if step_of(path.name) not in (marker.step, None):
        return Problem(MARKER, f"the step of the folder's name {path.name}", f"step {marker.step}")
    return Checkpoint(path, marker)


def passed_over(path: Path, problems: Sequence[Problem]) -> str:
    """The line about a folder that is not whole."""
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"checkpoint {path.name} is not whole and is passed over: {problems[0]}{more}"


def examine(path: Path, full: bool, progress: Progress = _silent) -> Checkpoint | list[Problem]:
    """A folder's checkpoint if it is whole, else everything that is wrong with it."""
    checkpoint = read_candidate(path)
    if isinstance(checkpoint, Problem):
        return [checkpoint]
    return file_problems(path, checkpoint.marker.files, full, progress) or checkpoint


def latest(folder: Path, full: bool = False) -> Choice:
    """The newest whole checkpoint under `folder` (a run's `checkpoints`), looked for by this process alone.

    Quick: marker and sizes. `full`: the content of every file too. For all ranks together see `load.choose`.
    """
    notes: list[str] = []
    for path in candidates(folder):
        found = examine(path, full)
        if isinstance(found, Checkpoint):
            return Choice(found, tuple(notes))
        notes.append(passed_over(path, found))
    return Choice(None, tuple(notes))


def open_checkpoint(path: Path, full: bool = False) -> Checkpoint:
    """The checkpoint in exactly this folder. Raises UserError if it isn't one or isn't whole."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected a checkpoint such as RUN/checkpoints/step_00000200")
    found = examine(path, full)
    if not isinstance(found, Checkpoint):
        raise UserError(f"{path} is not a whole checkpoint: {found[0]}; take another step (joy checkpoint list RUN)")
    return found


@contextmanager
def being_read(checkpoint: Checkpoint) -> Iterator[None]:
    """Keeps `retention.prune`, also another process's, from removing the checkpoint inside the with-block."""
    descriptor = os.open(checkpoint.path / MARKER, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def unread(path: Path) -> Iterator[bool]:
    """Whether nobody reads the checkpoint in this folder; if so nobody can begin to inside the with-block."""
    try:
        descriptor = os.open(path / MARKER, os.O_RDONLY)
    except FileNotFoundError:
        yield True  # no checkpoint, nothing to read
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
