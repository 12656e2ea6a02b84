"""`joy checkpoint`: list, verify, prune, merge, show and compare a run's checkpoints."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from megatron_joy.checkpoint.find import candidates, open_checkpoint
from megatron_joy.checkpoint.marker import MARKER, RECIPE, Marker, step_of, unfinished_of
from megatron_joy.checkpoint.retention import Policy
from megatron_joy.checkpoint.retention import prune as prune_folder
from megatron_joy.checkpoint.verify import Verdict, bytes_to_read, verdicts
from megatron_joy.cli.tables import console as wide_console
from megatron_joy.errors import UserError, WorkError
from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.schema import CheckpointSection

if TYPE_CHECKING:
    from megatron_joy.checkpoint.compare import Difference

app = typer.Typer(help="List, verify, prune, merge, show and compare a run's checkpoints.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)]
RunOrCheckpoint = Annotated[
    Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder, or one checkpoint's.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]

RECIPES = "as the run's recipe"

DEGREES = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "virtual_pipeline_model_parallel_size": "VPP",
    "context_parallel_size": "CP",
    "expert_model_parallel_size": "EP",
    "expert_tensor_parallel_size": "ETP",
    "data_parallel_size": "DP",
}
UNITS = ("B", "kB", "MB", "GB", "TB")
AGES = (("d", 86400), ("h", 3600), ("min", 60))


@app.command("list", epilog="Example: joy checkpoint list runs/joyai_tiny")
def list_command(run: RunOrCheckpoint, json_output: Json = False) -> None:
    """Show each checkpoint: step, size, age, whether it is whole (marker and sizes), and who wrote it."""
    folder, paths = _checkpoints_in(run)
    found = verdicts(paths, full=False)
    if json_output:
        print(json.dumps([as_json(verdict) for verdict in found], indent=2))
        return
    console = wide_console()
    if not found:
        console.print(f"no checkpoints in {escape(str(folder))}")
    else:
        console.print(_table(found))
    for path in sorted(folder.iterdir()):
        if unfinished_of(path.name):
            console.print(f"[dim]{path.name}: a save that was not finished, or one that is under way[/]")


@app.command("verify", epilog="Example: joy checkpoint verify runs/joyai_tiny")
def verify_command(run: RunOrCheckpoint, json_output: Json = False) -> None:
    """Read every byte of each checkpoint and hold it against what was committed; exit 1 if something is broken."""
    folder, paths = _checkpoints_in(run)
    with _bar() as bar:
        task = bar.add_task("verifying", total=bytes_to_read(paths))
        found = verdicts(paths, full=True, progress=lambda count: bar.advance(task, count))
    if json_output:
        print(json.dumps([as_json(verdict) for verdict in found], indent=2))
    else:
        for verdict in found:
            _say(verdict)
    broken = [verdict for verdict in found if not verdict.whole]
    if broken:
        names = ", ".join(verdict.path.name for verdict in broken)
        raise WorkError(f"{len(broken)} of {len(found)} checkpoints in {folder} are not whole: {names}")


@app.command("prune", epilog="Example: joy checkpoint prune runs/joyai_tiny --keep-last 2 --keep-every 1000")
def prune_command(
    run: Run,
    keep_last: Annotated[
        int | None, typer.Option(min=1, help="How many of the newest whole checkpoints to keep.", show_default=RECIPES)
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option(min=0, help="Keep steps that are a multiple of this; 0: none.", show_default=RECIPES)
    ] = None,
    keep_best: Annotated[
        int | None, typer.Option(min=0, help="Keep so many with the lowest validation loss.", show_default=RECIPES)
    ] = None,
    json_output: Json = False,
) -> None:
    """Remove the checkpoints that no rule keeps, and what killed saves left behind. Never the last whole one."""
    folder = checkpoints_of(run)
    section = _checkpoint_section(folder.absolute().parent)
    policy = Policy(
        section.keep_last if keep_last is None else keep_last,
        section.keep_every if keep_every is None else keep_every,
        section.keep_best if keep_best is None else keep_best,
    )
    done = prune_folder(folder, policy)
    if json_output:
        print(json.dumps({"kept": done.kept, "removed": done.removed, "notes": done.notes}, indent=2))
        return
    for verb, names in (("kept", done.kept), ("removed", done.removed)):
        print(f"{verb}: {', '.join(names) or 'none'}")
    for note in done.notes:
        print(note)


def _checkpoint_section(run: Path) -> CheckpointSection:
    """What the run's own recipe keeps; the defaults where the folder has no recipe."""
    recipe = run / RECIPE
    return load_recipe(str(recipe)).checkpoint if recipe.exists() else CheckpointSection()


@app.command(
    "merge", epilog="Example: joy checkpoint merge runs/joyai --last 4 --out runs/merged/checkpoints/step_00000000"
)
def merge_command(
    run: Run,
    out: Annotated[Path, typer.Option(help="The new checkpoint's folder.", show_default=False)],
    last: Annotated[int | None, typer.Option(min=2, help="So many of the newest.", show_default=False)] = None,
    steps: Annotated[str, typer.Option(help="Steps to merge, as 1000,2000,3000.", show_default=False)] = "",
    json_output: Json = False,
) -> None:
    """Write the mean of equally spaced checkpoints, weights and router biases, as a checkpoint to start from."""
    from megatron_joy.checkpoint.merge import chosen_steps, merge

    folder = checkpoints_of(run)
    chosen = chosen_steps(folder, last, _steps(steps))
    with _bar() as bar:
        task = bar.add_task("merging", total=None)
        merged = merge(folder, chosen, out, lambda count: bar.advance(task, count))
    if json_output:
        told = vars(merged) | {"checkpoint": str(out), "recipe": merged.recipe and str(merged.recipe)}
        print(json.dumps(told, indent=2))
        return
    print(f"{out}: mean of steps {', '.join(map(str, merged.steps))}, {size_text(merged.bytes)} of weights")
    if merged.recipe is not None:
        print(f"start from it: joy pretrain {merged.recipe} run.folder={merged.recipe.parent}")


def _steps(text: str) -> list[int]:
    try:
        return [int(step) for step in text.split(",") if step.strip()]
    except ValueError:
        raise UserError(f"--steps {text}: expected numbers with commas between them, as 1000,2000,3000") from None


def _bar() -> Progress:
    """A progress bar in bytes on a terminal's stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


Folder = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint's folder.", show_default=False)]
Prefix = Annotated[str, typer.Option(help="Only tensors whose key begins so.")]


@app.command("show", epilog="Example: joy checkpoint show runs/joyai_tiny/checkpoints/step_00000300 --norms")
def show_command(
    checkpoint: Folder,
    norms: Annotated[bool, typer.Option("--norms", help="Read every tensor and show its Euclidean norm.")] = False,
    prefix: Prefix = "",
    json_output: Json = False,
) -> None:
    """Show the tensors of a checkpoint: key, shape, number format and, if asked for, norm."""
    from megatron_joy.checkpoint.inspect import summaries  # torch, which the other commands don't need

    rows = list(summaries(open_checkpoint(checkpoint), norms, prefix))
    if json_output:
        print(json.dumps([vars(row) for row in rows], indent=2))
        return
    width = max((len(row.key) for row in rows), default=0)
    for row in rows:
        norm = "" if row.norm is None else f"  {row.norm:.6e}"
        print(f"{row.key:<{width}}  {row.dtype:<8}  {list(row.shape)!s:<20}{norm}".rstrip())


@app.command(
    "diff",
    epilog="Example: joy checkpoint diff runs/a/checkpoints/step_00000300 runs/b/checkpoints/step_00000300",
)
def diff_command(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint's folder.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one's.", show_default=False)],
    prefix: Prefix = "",
    json_output: Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor, whatever layouts wrote them; tensors that are equal aren't listed."""
    from megatron_joy.checkpoint.compare import differences

    rows = list(differences(open_checkpoint(a), open_checkpoint(b), prefix))
    if json_output:
        print(json.dumps([vars(row) for row in rows], indent=2))
        return
    differing = [row for row in rows if row.status != "equal"]
    width = max((len(row.key) for row in differing), default=0)
    for row in differing:
        print(f"{row.key:<{width}}  {_difference_text(row)}")
    print(f"{len(rows) - len(differing)} of {len(rows)} tensors are equal")


def _difference_text(row: "Difference") -> str:
    if row.max_absolute is None:
        return row.status if row.status != "shape" else f"shape {list(row.shape_a or ())} and {list(row.shape_b or ())}"
    dtypes = f"  {row.dtype_a} and {row.dtype_b}" if row.dtype_a != row.dtype_b else ""
    return (
        f"largest difference {row.max_absolute:.3e}, relative {row.max_relative:.3e}, "
        f"norms {row.norm_a:.6e} and {row.norm_b:.6e}{dtypes}"
    )


def _checkpoints_in(path: Path) -> tuple[Path, list[Path]]:
    """The folder to look into, and the checkpoints to look at: a run's, newest first, or the one that `path` is."""
    if (path / MARKER).is_file() or (path.is_dir() and step_of(path.name) is not None):
        return path, [path.absolute()]
    folder = checkpoints_of(path)
    return folder, candidates(folder)


def checkpoints_of(run: Path) -> Path:
    """The folder of a run's checkpoints. Raises UserError if there is none."""
    folder = run / "checkpoints"
    if folder.is_dir():
        return folder
    if run.name == "checkpoints" and run.is_dir():
        return run
    raise UserError(f"{run}: no folder checkpoints in it; expected a run's folder such as runs/joyai_tiny")


def layout_text(marker: Marker) -> str:
    """For example 'TP2 EP2 on 2', or '1 process'."""
    degrees = [f"{short}{marker.layout[key]}" for key, short in DEGREES.items() if marker.layout.get(key, 1) > 1]
    return f"{' '.join(degrees)} on {marker.world_size}" if degrees else f"{marker.world_size} process"


def size_text(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in UNITS:
        if count < 1000 or unit == UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def age_text(seconds: float) -> str:
    """Seconds for people, in the largest unit that fits."""
    for unit, length in AGES:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def as_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON."""
    marker = verdict.checkpoint.marker if verdict.checkpoint else None
    return {
        "folder": str(verdict.path),
        "whole": verdict.whole,
        "problems": [vars(problem) for problem in verdict.problems],
        "step": marker.step if marker else None,
        "attempt": marker.attempt if marker else None,
        "samples": marker.samples if marker else None,
        "bytes": marker.bytes if marker else None,
        "time": marker.time if marker else None,
        "world_size": marker.world_size if marker else None,
        "layout": marker.layout if marker else None,
        "versions": marker.versions if marker else None,
    }


def _table(found: list[Verdict]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("checkpoint", "size", "age", "layout", "attempt", "state"):
        table.add_column(name, justify="right" if name in ("size", "age", "attempt") else "left", overflow="fold")
    for verdict in found:
        state = "[green]whole[/]" if verdict.whole else f"[red]not whole[/]: {escape(str(verdict.problems[0]))}"
        row = ("?", "?", "?", "?")
        if verdict.checkpoint:
            marker = verdict.checkpoint.marker
            row = (
                size_text(marker.bytes),
                age_text(time.time() - marker.time),
                layout_text(marker),
                str(marker.attempt),
            )
        table.add_row(verdict.path.name, *row, state)
    return table


def _say(verdict: Verdict) -> None:
    if verdict.whole and verdict.checkpoint:
        marker = verdict.checkpoint.marker
        print(f"{verdict.path.name}: whole, {len(marker.files)} files, {size_text(marker.bytes)}")
    for problem in verdict.problems:
        print(f"{verdict.path.name}: {problem}")
