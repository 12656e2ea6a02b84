"""The run's state as rank 0 writes it when all ranks have agreed on it. A supervisor believes it before exit codes,
which say little: srun gives 143 for a planned stop and may give 0 when a node is dead.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_joy.runstate import launch_folder
from megatron_joy.runstate.files import read_json, write_json

Word = Literal["running", "stopped", "finished"]


@dataclass(frozen=True)
class State:
    """How an attempt stands. done: updates that are done."""

    fence: int
    word: Word
    done: int


def _path(run: Path) -> Path:
    return launch_folder(run) / "state.json"


def write_state(run: Path, state: State) -> None:
    """Replaces the run's state."""
    write_json(_path(run), asdict(state))


def read_state(run: Path, fence: int) -> State | None:
    """The state of an attempt; None when it has written none."""
    value = read_json(_path(run))
    try:
        state = State(**value) if value is not None else None
    except TypeError:
        return None
    return state if state is not None and state.fence == fence else None


def updates_saved(run: Path) -> int:
    """Updates that the newest supervised attempt had done when it left with a checkpoint; 0 when it did not."""
    value = read_json(_path(run)) or {}
    return int(value.get("done", 0)) if value.get("word") in ("stopped", "finished") else 0
