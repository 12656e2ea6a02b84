"""Reading every byte of a run's checkpoints and holding it against what was committed; without torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_joy.checkpoint.find import Problem, examine, read_candidate
from megatron_joy.checkpoint.marker import Checkpoint
from megatron_joy.data.checksum import Progress


@dataclass(frozen=True)
class Verdict:
    """What a look at one folder gave. Whole: a checkpoint and no problems."""

    path: Path
    checkpoint: Checkpoint | None
    problems: tuple[Problem, ...]

    @property
    def whole(self) -> bool:
        """True if everything is as it was committed."""
        return not self.problems


def judge(path: Path, full: bool, progress: Progress = lambda _: None) -> Verdict:
    """Looks at a folder: marker and sizes and, with `full`, every file's BLAKE3."""
    found = examine(path, full, progress)
    marked = read_candidate(path)
    checkpoint = marked if isinstance(marked, Checkpoint) else None
    return Verdict(path, checkpoint, () if isinstance(found, Checkpoint) else tuple(found))


def verdicts(paths: Iterable[Path], full: bool, progress: Progress = lambda _: None) -> list[Verdict]:
    """`judge` for each of these folders."""
    return [judge(path, full, progress) for path in paths]


def bytes_to_read(paths: Iterable[Path]) -> int:
    """How many bytes a full verification of these folders reads, for a progress bar."""
    marked = (read_candidate(path) for path in paths)
    return sum(found.marker.bytes for found in marked if isinstance(found, Checkpoint))
