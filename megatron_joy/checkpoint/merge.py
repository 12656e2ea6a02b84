"""The mean of several checkpoints of a run as a checkpoint of weights, with memory for one tensor.

Averaging checkpoints of the constant-learning-rate phase stands in for the decay of the learning rate (arXiv
2604.03044, section 2.4, which prints neither weights nor window; here all weigh the same and lie equally far apart).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_joy.checkpoint.boxes import Index, LazyBoxes
from megatron_joy.checkpoint.contents import MASTER, OPTIMIZER_PREFIX, megatron_object
from megatron_joy.checkpoint.find import being_read, candidates, open_checkpoint, read_candidate
from megatron_joy.checkpoint.marker import MARKER, Checkpoint, folder_name, step_of
from megatron_joy.checkpoint.save import seal
from megatron_joy.checkpoint.storage import Reader
from megatron_joy.checkpoint.work_folder import refuse_existing, refuse_full_disk, work_folder, write_run_recipe
from megatron_joy.checkpoint.writing import write_alone
from megatron_joy.data.checksum import file_blake3
from megatron_joy.errors import UserError
from megatron_joy.recipe.schema import LayoutSection

FEWEST = 2
Advance = Callable[[int], None]  # is told the bytes written since the last call


@dataclass(frozen=True)
class Merged:
    """What was written. `recipe`: the run's recipe.toml that was written as well, for a run to start from."""

    checkpoint: Path
    steps: tuple[int, ...]
    tensors: int
    bytes: int
    recipe: Path | None


def chosen_steps(folder: Path, last: int | None, steps: Sequence[int]) -> list[int]:
    """Steps of a run's `checkpoints` to be merged, ascending: the `last` newest whole ones, or those named.

    Raises UserError if there are too few, or they don't lie equally far apart.
    """
    if (last is None) == (not steps):
        raise UserError("name the checkpoints to merge either with --last K or with --steps A,B,C")
    there = sorted(one.step for path in candidates(folder) if isinstance(one := read_candidate(path), Checkpoint))
    listed = ", ".join(map(str, there)) or "none"
    wanted = there[-last:] if last is not None else sorted(set(steps))
    if absent := [step for step in wanted if step not in there]:
        raise UserError(f"--steps {absent[0]}: {folder} has no such checkpoint; there are {listed}")
    if len(wanted) < max(last or 0, FEWEST):
        raise UserError(
            f"{folder}: {len(wanted)} checkpoints to merge, expected {max(last or 0, FEWEST)} or more; "
            f"there are {listed}"
        )
    gaps = [b - a for a, b in pairwise(wanted)]
    if len(set(gaps)) > 1:
        raise UserError(
            f"checkpoints {', '.join(map(str, wanted))} lie {', '.join(map(str, gaps))} steps apart, a mean is of "
            f"equally spaced ones; name such with --steps (there are {listed})"
        )
    return wanted


def merge(folder: Path, steps: Sequence[int], out: Path, advance: Advance = lambda _: None) -> Merged:
    """Writes the mean of these checkpoints' weights and router biases as the new checkpoint `out`, of step 0.

    Each element is the mean over the checkpoints (of the fp32 master weights where they have them), added up in fp64,
    rounded to fp32 and then to the weights' dtype. No optimizer state: a run that starts from it starts a fresh
    optimizer. Every source is verified and none can be pruned meanwhile. When `out` is RUN/checkpoints/step_00000000
    the recipe becomes RUN's as well, so that `joy pretrain` goes on from there.

    Raises UserError before anything is written (a source that isn't whole or is of another model, `out` there already,
    too little disk), WorkError when the disk refuses; nothing is left then.
    """
    _check_out(out)
    with ExitStack() as held:
        sources = [open_checkpoint(folder / folder_name(step), full=True) for step in steps]
        for source in sources:
            held.enter_context(being_read(source))
        tensors = _means([Reader(source) for source in sources], sources, advance)
        needed = sum(boxes.numel() * boxes.dtype.itemsize for boxes in tensors.values())
        refuse_full_disk(out, needed)
        recipe, state = sources[-1].recipe_path.read_bytes(), _provenance(folder, sources)
        with work_folder(out, {"direction": "merge", **state}) as work:
            files = write_alone(work.folder, tensors | megatron_object(0))
            seal(
                work.folder,
                files,
                recipe,
                step=0,
                attempt=0,
                world_size=1,
                layout=LayoutSection().model_dump(),
                optimizer_step=None,
                state=state,
            )
    return Merged(out, tuple(steps), len(tensors), needed, write_run_recipe(out, recipe))


def _means(readers: Sequence[Reader], sources: Sequence[Checkpoint], advance: Advance) -> dict[str, LazyBoxes]:
    """The result's tensors, which read and add up their sources when they are written."""
    first = readers[0].tensors
    weights = {key: entry for key, entry in first.items() if not key.startswith(OPTIMIZER_PREFIX)}
    for reader, source in zip(readers[1:], sources[1:], strict=True):
        others = {key: entry for key, entry in reader.tensors.items() if not key.startswith(OPTIMIZER_PREFIX)}
        for key in sorted(weights.keys() | others.keys()):
            a, b = weights.get(key), others.get(key)
            if a is None or b is None or a.size != b.size or a.properties.dtype != b.properties.dtype:
                raise UserError(
                    f"{source.path} is of another model than {sources[0].path}: {key} is {_told(b)}, there {_told(a)}; "
                    "merge checkpoints of one model"
                )
    tensors = {}
    for key, entry in weights.items():
        master = f"{OPTIMIZER_PREFIX}{MASTER}.{key}"
        source_key = master if all(master in reader.tensors for reader in readers) else key
        dtype = entry.properties.dtype
        read = _mean(readers, source_key, dtype, advance)
        tensors[key] = LazyBoxes.of(entry.size, dtype, readers[0].parts(source_key), read)
    return tensors


def _told(entry: Any) -> str:
    return "absent" if entry is None else f"{entry.properties.dtype} {list(entry.size)}".removeprefix("torch.")


def _mean(
    readers: Sequence[Reader], key: str, dtype: torch.dtype, advance: Advance
) -> Callable[[Index, Index], Tensor]:
    def read(offset: Index, size: Index) -> Tensor:
        total = torch.zeros(size, dtype=torch.float64)
        for reader in readers:
            total += reader.box(key, offset, size)
        mean = (total / len(readers)).float().to(dtype)
        advance(mean.nbytes)
        return mean

    return read


def _provenance(folder: Path, sources: Sequence[Checkpoint]) -> dict[str, Any]:
    """Where the weights are from, in the place where `joy convert from-hf` says so too."""
    merged = [
        {"step": source.step, "attempt": source.marker.attempt, "marker_blake3": file_blake3(source.path / MARKER)}
        for source in sources
    ]
    known = sources[-1].state.get("imported") or {}  # an import's own count of its vocabulary holds for the mean too
    return {"imported": {**known, "run": folder.absolute().parent.name, "merged": merged}}


def _check_out(out: Path) -> None:
    if step_of(out.name) not in (0, None):
        raise UserError(f"{out}: the mean of checkpoints is of step 0; name it {out.with_name(folder_name(0))}")
    refuse_existing(out)
