"""`COMMITTED.json`: what makes a folder a whole checkpoint, and what can be asked of one without torch.

The marker is the last file written. It names every other file with size and BLAKE3 and carries a digest of itself, so
a folder without it, or with one that doesn't hold, is no checkpoint.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from megatron_joy.data.atomic import write_atomically

MARKER = "COMMITTED.json"
RECIPE = "recipe.toml"
FORMAT_VERSION = 2
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]+")
# A checkpoint, or one that another of the same step is about to replace (`save`): it counts until the other is there.
_FOLDER_NAME = re.compile(r"step_(\d{8,})|\.step_(\d{8,})\.replaced")
_UNFINISHED_NAME = re.compile(r"\.step_(\d{8,})\.writing-(\d+)")


class MarkerProblem(ValueError):
    """Why a marker doesn't make its folder a checkpoint; the text says what was found and what was expected."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its name in the folder, its size, its BLAKE3 in hexadecimal."""

    name: str
    bytes: int
    blake3: str


@dataclass(frozen=True)
class Marker:
    """Everything about a checkpoint that isn't a tensor. `state` is the training loop's own."""

    step: int
    attempt: int
    time: float  # seconds since 1970, UTC
    world_size: int
    layout: dict[str, Any]
    versions: dict[str, str]
    recipe_sha256: str
    optimizer_step: int | None  # None: weights only
    state: dict[str, Any]
    files: tuple[FileEntry, ...]
    format_version: int = FORMAT_VERSION

    @property
    def bytes(self) -> int:
        """Size of all files, the marker not counted."""
        return sum(entry.bytes for entry in self.files)

    @property
    def samples(self) -> int | None:
        """Samples consumed, if the training loop said so (in its state's 'progress', or beside it)."""
        return self.state.get("progress", self.state).get("samples")

    @property
    def validation_loss(self) -> float | None:
        """Loss on validation data of just these weights, if the training loop had validated them."""
        return self.state.get("validation_loss")

    def entry(self, name: str) -> FileEntry:
        """The entry of a file; KeyError if the checkpoint has no such file."""
        for entry in self.files:
            if entry.name == name:
                return entry
        raise KeyError(name)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a marker that holds (see `find.latest` and `open_checkpoint`)."""

    path: Path
    marker: Marker

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return self.marker.step

    @property
    def state(self) -> dict[str, Any]:
        """What the training loop gave to `save_checkpoint`."""
        return self.marker.state

    @property
    def recipe_path(self) -> Path:
        """The resolved recipe that the checkpoint was written under, as TOML."""
        return self.path / RECIPE


def folder_name(step: int) -> str:
    """For example step_00000200."""
    return f"step_{step:08d}"


def replaced_name(step: int) -> str:
    """What the folder is called while a newer checkpoint of the same step takes its place."""
    return f".{folder_name(step)}.replaced"


def unfinished_name(step: int, attempt: int) -> str:
    """The hidden folder in which an attempt of a run writes a checkpoint."""
    return f".{folder_name(step)}.writing-{attempt}"


def unfinished_of(name: str) -> tuple[int, int] | None:
    """(step, attempt) of an unfinished checkpoint's folder name, or None if it isn't one."""
    match = _UNFINISHED_NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def step_of(name: str) -> int | None:
    """The step in a checkpoint folder's name, or None if it isn't one."""
    match = _FOLDER_NAME.fullmatch(name)
    return int(match[1] or match[2]) if match else None


def _digest(content: dict[str, Any]) -> str:
    return blake3(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_marker(folder: Path, marker: Marker) -> None:
    """Writes and syncs the marker. Raises ValueError if `state` isn't JSON (NaN and infinity aren't)."""
    content = asdict(marker)
    content["files"] = [asdict(entry) for entry in marker.files]
    text = json.dumps(content | {"digest": _digest(content)}, indent=1, allow_nan=False)
    write_atomically(folder / MARKER, text.encode())


def read_marker(folder: Path) -> Marker:
    """The marker of a checkpoint folder. Raises MarkerProblem if it is absent, torn, altered or of another format."""
    try:
        content = json.loads((folder / MARKER).read_text())
    except FileNotFoundError:
        raise MarkerProblem(f"{MARKER} is missing (the save was not finished)") from None
    except (OSError, ValueError) as error:
        raise MarkerProblem(f"{MARKER} can't be read: {error}") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version") if isinstance(content, dict) else content
        raise MarkerProblem(f"{MARKER} has format_version {found!r}, expected {FORMAT_VERSION}")
    digest = content.pop("digest", None)
    try:
        expected = _digest(content)
        marker = Marker(**content | {"files": _entries(content["files"])})
    except (TypeError, KeyError, ValueError) as error:
        raise MarkerProblem(f"{MARKER} is malformed: {error}") from None
    if digest != expected:
        raise MarkerProblem(f"{MARKER} has digest {digest}, its content gives {expected}")
    return marker


def _entries(rows: Sequence[dict[str, Any]]) -> tuple[FileEntry, ...]:
    entries = tuple(FileEntry(**row) for row in rows)
    for entry in entries:
        if not _PLAIN_NAME.fullmatch(entry.name) or entry.name in (".", ".."):
            raise ValueError(f"{entry.name!r} is not a plain file name")
    return entries
