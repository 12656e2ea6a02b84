"""Which checkpoints stay. The newest whole one always does, and so does one that somebody reads."""

import shutil
from collections.abc import Iterable, Sequence
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


@dataclass(frozen=True)
class Policy:
    """Which whole checkpoints stay: each that any of the three rules names.

    last: so many of the newest, at least 1. every: those whose step is a multiple of it; 0: none for that reason.
    best: so many with the lowest validation loss, of equal ones the newer; 0: none for that reason.
    """

    last: int
    every: int = 0
    best: int = 0

    def kept(self, whole: Sequence[Checkpoint]) -> set[int]:
        """Steps of the checkpoints that stay; `whole` is newest first."""
        steps = {checkpoint.step for checkpoint in whole[: max(self.last, 1)]}
        if self.every:
            steps |= {checkpoint.step for checkpoint in whole if checkpoint.step % self.every == 0}
        judged = [(loss, -one.step) for one in whole if (loss := one.marker.validation_loss) is not None]
        return steps | {-negative for _, negative in sorted(judged)[: self.best]}


def prune(folder: Path, policy: Policy, attempt: int | None = None) -> Pruned:
    """Keeps the whole checkpoints of a run's `checkpoints` that the policy names and removes the others.

    Folders that aren't whole go when they are older than the oldest of the last ones; newer ones stay to be looked at.
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
    kept = policy.kept(whole)
    oldest_of_last = whole[: max(policy.last, 1)][-1].step if whole else 0
    for path, found in looked_at:
        step = step_of(path.name) or 0
        if step >= oldest_of_last or (isinstance(found, Checkpoint) and step in kept):
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
