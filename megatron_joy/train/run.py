"""A run: its folder, its recipe, how often it was started, and what must be known to go on with it."""

import json
import os
import platform as host
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_joy import __version__
from megatron_joy.data.atomic import write_atomically
from megatron_joy.errors import UserError
from megatron_joy.platform.process import Process
from megatron_joy.recipe import Recipe, check_resume, dump_recipe, load_recipe

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "tokenizers", "gigatoken", "numpy")


@dataclass
class Progress:
    """What a checkpoint keeps beside weights: enough to go on with the very next sample."""

    step: int = 0  # updates done
    samples: int = 0
    tokens: int = 0
    best_validation_loss: float | None = None

    def advance(self, samples: int, tokens: int) -> None:
        """Counts one update."""
        self.step += 1
        self.samples += samples
        self.tokens += tokens

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)


@dataclass
class Run:
    """One attempt at a run, the same object on every rank up to its process."""

    recipe: Recipe
    process: Process
    folder: Path
    attempt: int
    progress: Progress


def environment() -> dict[str, Any]:
    """Versions and hardware, no variables of the environment: those may hold secrets."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "megatron_joy": __version__,
        "python": sys.version.split()[0],
        "packages": packages,
        "host": host.node(),
        "system": host.platform(),
        "processor": host.machine(),
        "cpu_cores": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def open_run(recipe: Recipe, process: Process) -> Run:
    """Makes or reopens the run's folder: checks the recipe against the one it was started with, counts the attempt.

    Only rank 0 touches the folder; what it finds wrong is raised on every rank (UserError), so that none waits.
    """
    folder = Path(recipe.run.folder or "")
    outcome: list[Any] = [None, None]
    if process.is_first_rank:
        try:
            outcome[0] = _prepare_folder(recipe, folder)
        except (UserError, OSError) as error:
            outcome[1] = str(error) if isinstance(error, UserError) else f"run.folder {folder}: {error.strerror}"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return Run(recipe, process, folder, int(outcome[0]), Progress())


def _prepare_folder(recipe: Recipe, folder: Path) -> int:
    saved = folder / "recipe.toml"
    if saved.exists():
        check_resume(load_recipe(str(saved)), recipe)
    elif folder.exists() and any(entry.name not in ("logs",) for entry in folder.iterdir()):
        raise UserError(
            f"run.folder {folder}: the folder has other things in it and no recipe.toml; name a new or empty folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    attempt = _attempts(folder)
    write_atomically(saved, dump_recipe(recipe).encode())
    write_atomically(folder / "environment.json", json.dumps(environment(), indent=2).encode())
    return attempt


def _attempts(folder: Path) -> int:
    """How many attempts there were, by the number that every event carries."""
    events = folder / "events.jsonl"
    if not events.exists():
        return 0
    attempts = [-1]
    for line in events.read_bytes().splitlines():
        try:
            attempts.append(int(json.loads(line)["attempt"]))
        except (ValueError, KeyError, TypeError):
            continue  # torn by a kill; the metrics writer repairs it and says so
    return max(attempts) + 1
