"""Which checkpoints stay. The newest whole one always does, and so does one that somebody reads."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_joy.checkpoint.find import candidates, examine, unread
from megatron_joy.checkpoint.marker import Checkpoint, folder_name, step_of, unfinished_of

REMOVING = ".removing"  # added to the name of a folder that is being removed, so that half of it is no checkpoint


@dataclass
class Pruned:
    """Names of the folders that stay and of those that went, newest first, and what is worth saying about others."""

    kept: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prune(folder: Path, keep_last: int, attempt: int | None = None) -> Pruned:
    """Keeps the `keep_last` (at least 1) newest whole checkpoints of a run's `checkpoints` and removes older ones.

    Folders that aren't whole go with them when they are older than the oldest kept; newer ones stay to be looked at.
    What killed saves left behind goes when it is of an attempt before `attempt` (None: the newest that left a trace
    here): one of the same attempt may be being written. What can't be removed, or is being read, stays and is noted.
    One process calls this, not all ranks; quick checks only.
    """
    done = Pruned()
    if not folder.is_dir():
        return done
    looked_at = [(path, examine(path, full=False)) for path in candidates(folder)]
    whole = [found for _, found in looked_at if isinstance(found, Checkpoint)]
    present = _newest_attempt(whole, folder) if attempt is None else attempt
    oldest_kept = whole[: max(keep_last, 1)][-1] if whole else None
    for path, _ in looked_at:
        if oldest_kept is None or (step_of(path.name) or 0) >= oldest_kept.step:
            done.kept.append(path.name)
        else:
            _remove(path, done)
    for path in _leftovers(folder, present):
        _remove(path, done)
    return done


def discard(paths: Iterable[Path]) -> Pruned:
    """Removes these checkpoints, which nobody may go on from any more. One process calls this."""
    done = Pruned()
    for path in paths:
        _remove(path, done)
    return done


def _newest_attempt(whole: list[Checkpoint], folder: Path) -> int:
    unfinished = [parsed[1] for path in folder.iterdir() if (parsed := unfinished_of(path.name))]
    return max([*unfinished, *(checkpoint.marker.attempt for checkpoint in whole)], default=0)


def _leftovers(folder: Path, attempt: int) -> list[Path]:
    """Hidden folders that nobody needs: of earlier attempts' saves, of replaced checkpoints, of removals cut short."""
    found = []
    for path in sorted(folder.glob(".step_*")):
        unfinished, step = unfinished_of(path.name), step_of(path.name)
        superseded = step is not None and (folder / folder_name(step)).exists()
        if path.name.endswith(REMOVING) or superseded or (unfinished and unfinished[1] < attempt):
            found.append(path)
    return found


def _remove(path: Path, done: Pruned) -> None:
    try:
        with unread(path) as free:
            if not free:
                done.kept.append(path.name)
                done.notes.append(f"checkpoint {path.name} stays: it is being read")
                return
            hidden = path if path.name.endswith(REMOVING) else path.with_name(f".{path.name.lstrip('.')}{REMOVING}")
            path.rename(hidden)
        shutil.rmtree(hidden)
        done.removed.append(path.name)
    except OSError as error:
        done.notes.append(f"checkpoint {path.name} could not be removed: {error.strerror}")
