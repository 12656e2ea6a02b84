"""A run: its folder, its recipe, how often it was started, and what must be known to go on with it."""

import fcntl
import json
import os
import platform as host
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_joy import __version__
from megatron_joy.data.atomic import write_atomically
from megatron_joy.errors import UserError, WorkError
from megatron_joy.platform.process import Process
from megatron_joy.recipe import Recipe, check_run_folder, dump_recipe
from megatron_joy.recipe.ledger import LEDGER_FILE, Ledger, as_json, load_ledger, read_ledger
from megatron_joy.recipe.resume import RECIPE_FILE

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "tokenizers", "gigatoken", "numpy")


@dataclass
class Progress:
    """What a checkpoint keeps beside weights: enough to go on with the very next sample."""

    step: int = 0  # updates done
    samples: int = 0
    tokens: int = 0
    best_validation_loss: float | None = None
    # What a spike is held against: the newest updates that were made in this stage (`recipe.guards.spike_window`).
    recent_stage: str = ""
    recent_losses: list[float] = field(default_factory=list)
    recent_grad_norms: list[float] = field(default_factory=list)

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
    ledger: Ledger = ()  # what its samples follow from; complete when the run begins or goes on


def environment() -> dict[str, Any]:
    """Versions and hardware; of the environment's variables, which may hold secrets, only the number of the job."""
    packages: dict[str, str | None] = {}
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
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "system": host.platform(),
        "processor": host.machine(),
        "cpu_cores": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def open_run(recipe: Recipe, process: Process) -> Run:
    """Looks at the run's folder, writes nothing: is it this recipe's, and how often was it started.

    Raises UserError, on every rank so that none waits, for a folder that isn't this run's.
    """
    folder = Path(recipe.run.folder or "")

    def look() -> int:
        check_run_folder(recipe)
        return _attempts(folder)

    return Run(recipe, process, folder, _on_first_rank(process, folder, look), Progress())


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Makes the folder and writes what is known at the start; inside the with-block no other process trains the run.

    Raises UserError on every rank when the folder can't be written or is being trained.
    """
    with ExitStack() as opened:

        def record() -> None:
            (run.folder / "logs").mkdir(parents=True, exist_ok=True)
            opened.enter_context(_alone_in(run.folder))
            _write_ledger(run)
            write_atomically(run.folder / RECIPE_FILE, dump_recipe(run.recipe).encode())
            write_atomically(run.folder / "environment.json", json.dumps(environment(), indent=2).encode())

        _on_first_rank(run.process, run.folder, record)
        yield


def ledgers_on_disk(run: Run) -> tuple[Ledger | None, Ledger | None]:
    """(the one in the run's folder, the one that the recipe wants to be repeated), None for each that isn't there.

    Read on rank 0 for all. Raises UserError for a damaged one.
    """
    wanted = run.recipe.guards.ledger
    return _on_first_rank(
        run.process,
        run.folder,
        lambda: (read_ledger(run.folder), None if wanted is None else load_ledger(Path(wanted))),
    )


def _write_ledger(run: Run) -> None:
    write_atomically(run.folder / LEDGER_FILE, json.dumps(as_json(run.ledger)).encode())


def decide(run: Run, ledger: Ledger) -> None:
    """Makes this the run's ledger, on disk before anything follows from it; all ranks call it together.

    Raises WorkError on every rank when it can't be written.
    """
    run.ledger = ledger
    try:
        _on_first_rank(run.process, run.folder, lambda: _write_ledger(run))
    except UserError as error:
        raise WorkError(f"a guard's decision could not be written: {error}") from None


def _on_first_rank[T](process: Process, folder: Path, action: Callable[[], T]) -> T:
    """Does something on rank 0 alone; all ranks get its result, or raise its error as UserError."""
    outcome: list[Any] = [None, None]
    if process.is_first_rank:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
        except OSError as error:
            outcome[1] = f"run.folder {folder}: {error.strerror}{f' ({error.filename})' if error.filename else ''}"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder that ends with this process, however it ends. Where there are no locks, none."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"run.folder {folder}: another process trains this run now; wait for it, stop it, or name a new folder"
        ) from None
    except OSError:
        pass  # some network file systems
    try:
        yield
    finally:
        os.close(descriptor)


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
