"""A new checkpoint or model folder that appears whole or not at all; work on it that was killed is gone on with."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_joy.checkpoint.marker import RECIPE
from megatron_joy.data.atomic import sync, write_atomically
from megatron_joy.errors import UserError, WorkError

CHECKPOINTS = "checkpoints"  # a run's folder of them
_WORK_MARK = ".unfinished"
_FOLDER, _RECORDS, _IDENTITY, _LOCK = "folder", "records", "identity.json", "lock"


class Stopped(WorkError):
    """The work was interrupted; what is finished of it is kept, and the same command goes on."""


def refuse_existing(out: Path) -> None:
    """Raises UserError when `out` is a file, a folder with something in it, or can't be one for a file in its path."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: is there already and not empty; name a new folder, nothing is overwritten")
    for place in out.absolute().parents:
        if place.exists():
            if not place.is_dir():
                raise UserError(f"{out}: {place} is a file; name a new folder inside a folder")
            return


def refuse_full_disk(out: Path, needed: int) -> None:
    """Raises UserError when the disk that `out` will lie on has not `needed` bytes left for what is not there yet."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    needed -= sum(path.stat().st_size for path in (_work_place(out) / _FOLDER).glob("*"))
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{out}: needs {needed:,} bytes, the disk of {place} has {free:,} left; free some or move")


@dataclass(frozen=True)
class Work:
    """A hidden folder that is written into, and a record of each file of it that is finished.

    note: what became of an earlier start's work; None where there was none.
    """

    folder: Path
    records: Path
    note: str | None = None

    def record_of(self, name: str) -> dict[str, Any] | None:
        """What an earlier start noted when it had finished the file; None if it had not."""
        try:
            content: dict[str, Any] = json.loads((self.records / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content

    def keep(self, name: str, record: Mapping[str, Any]) -> None:
        """Notes that a file is finished and on the disk."""
        write_atomically(self.records / f"{name}.json", json.dumps(record).encode())


def _work_place(out: Path) -> Path:
    return out.absolute().with_name(f".{out.name}{_WORK_MARK}")


@contextmanager
def work_folder(out: Path, identity: Mapping[str, Any]) -> Iterator[Work]:
    """Gives a hidden folder beside `out` to write into; it becomes `out` when the block ends without an error.

    After a kill or Ctrl-C it stays, hidden, never taken for a model; a start of the same `identity` (JSON: all that
    decides what is written) finds it again, one of another identity starts afresh. After an error nothing is left.
    Raises UserError before anything is written when `out` is there or another process is writing it, WorkError when the
    disk refuses.
    """
    refuse_existing(out)
    place = _work_place(out)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _locked(place / _LOCK, out):
            try:
                work = _begin(place, identity)
                yield work
                for path in [*work.folder.iterdir(), work.folder]:
                    sync(path)
                os.replace(work.folder, out)
                sync(out.absolute().parent)
                shutil.rmtree(place, ignore_errors=True)
            except Stopped:
                raise
            except Exception:
                shutil.rmtree(place, ignore_errors=True)
                raise
    except OSError as error:
        raise WorkError(f"{out}: could not be written: {error.strerror or error}; nothing was left there") from None


def _begin(place: Path, identity: Mapping[str, Any]) -> Work:
    path, text, note = place / _IDENTITY, json.dumps(identity, sort_keys=True), None
    found = path.read_text(encoding="utf-8") if path.is_file() else None
    if found is not None:
        note = "an earlier start was interrupted; what it had finished was checked and kept"
    if found is not None and found != text:
        note = "an earlier start from other weights or with other options was interrupted; its work was thrown away"
        for name in (_FOLDER, _RECORDS):
            shutil.rmtree(place / name, ignore_errors=True)
    for name in (_FOLDER, _RECORDS):
        (place / name).mkdir(exist_ok=True)
    write_atomically(path, text.encode())
    work = Work(place / _FOLDER, place / _RECORDS, note)
    for unfinished in (path for path in work.folder.iterdir() if work.record_of(path.name) is None):
        unfinished.unlink()
    return work


@contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    """Two conversions into one folder would undo each other's work."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is writing it; wait for it or name another folder") from None
        yield
    finally:
        os.close(descriptor)


def write_run_recipe(out: Path, recipe: bytes) -> Path | None:
    """Makes a checkpoint that a run is to start from a run: RUN/recipe.toml, when `out` lies in RUN/checkpoints.

    None, and nothing is written, elsewhere and where RUN has one already.
    """
    run = out.absolute().parent.parent
    if out.absolute().parent.name != CHECKPOINTS or (run / RECIPE).exists():
        return None
    write_atomically(run / RECIPE, recipe)
    return run / RECIPE
