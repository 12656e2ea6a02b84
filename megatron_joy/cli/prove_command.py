"""`joy prove`: a recipe's layout in small, on CPU, against one process."""

import json
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_joy.prove.numbers import Routing
from megatron_joy.prove.proof import FORMATS, STEPS_BEFORE, OnStep, Proof, prove
from megatron_joy.prove.shrink import WIDTH, Change
from megatron_joy.recipe import load_recipe

app = typer.Typer()

DEGREES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
    "DP": "data_parallel_size",
}
NAMES = {
    "loss": "loss",
    "mtp_loss": "MTP loss",
    "grad_norm": "gradient norm",
    "validation": "validation",
    "parameters": "parameters",
}


class Precision(StrEnum):
    """Of the compared runs."""

    FP32 = "fp32"
    RECIPE = "recipe"


@app.command("prove", epilog="Example: joy prove joyai_tiny --world 4 layout.tensor_model_parallel_size=2")
def prove_command(
    recipe: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped name or a TOML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE ...", help="Other layouts.")] = None,
    world: Annotated[
        int | None, typer.Option("--world", min=1, help="Processes at most; default: 4 for each core, up to 16.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps to compare.")] = 10,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Keep logs, checkpoint and weights here.")
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option("--precision", help="fp32, or the recipe's own (FP8 emulated), with tolerances measured from it."),
    ] = Precision.FP32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value.")] = False,
) -> None:
    """Run the recipe's parallel layout, shrunk in width only, on CPU, and hold it against one process.

    One process trains a few steps and writes a checkpoint; the layout reads it and both go on with the same samples.
    Each step's losses and gradient norm and, after the last one, validation losses and all parameters are compared, in
    fp32 unless the recipe's own precision is asked for. Exits 0 when all are within tolerance, 1 when not.
    """
    resolved = load_recipe(recipe, overrides or [])
    # By default SIGTERM would leave the scratch folder behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with _progress(steps) as progress:
        proof = prove(resolved, world, steps, keep, _advance(progress, steps), precision is Precision.RECIPE)
    if as_json:
        print(json.dumps({"name": resolved.name} | proof.as_json(), indent=2))
    else:
        _show(resolved.name, proof)
    if not proof.holds:
        raise typer.Exit(1)


def _progress(steps: int) -> Progress:
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = sys.stderr.isatty()
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)


def _advance(progress: Progress, steps: int) -> OnStep:
    tasks = {
        "reference": progress.add_task("one process", total=STEPS_BEFORE + steps),
        "in fp32": progress.add_task("one process in fp32", total=STEPS_BEFORE + steps, visible=False),
        "layout": progress.add_task("the layout", total=steps),
    }

    def on_step(run: str, number: int) -> None:
        progress.update(tasks[run], advance=1, visible=True)

    return on_step


def _layout_line(proof: Proof) -> str:
    layout = proof.shrunk.recipe.layout
    degrees = [f"{name} {getattr(layout, key)}" for name, key in DEGREES.items() if getattr(layout, key) > 1]
    return f"{' x '.join(degrees) or 'one process'}, {layout.world_size} processes"


def _routing_line(routing: Routing) -> str:
    share = f"{routing.overruled} of {routing.decisions}"
    return f"routing: in {share} choices of experts rounding decided, and the choice of one process was taken"


def _changes_line(title: str, changes: list[Change]) -> str:
    return f"{title}: " + ", ".join(f"{change.key} {_value(change.was)} -> {_value(change.now)}" for change in changes)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _show(name: str, proof: Proof) -> None:
    console = Console(highlight=False)
    console.print(f"[bold]{name}[/bold]: {_layout_line(proof)}, against one process")
    for change in proof.shrunk.reduced:
        console.print(f"[yellow]reduced[/yellow] ({change.why}): {change.key} {change.was} -> {change.now}")
    widths = [change for change in proof.shrunk.changes if change.why == WIDTH]
    if widths:
        console.print(_changes_line("widths", widths), style="dim", soft_wrap=True)
    console.print(_steps_table(proof))
    console.print(_verdict_table(proof))
    if proof.format_cost is not None:
        told = f"tolerances: {FORMATS:g} times what one process in this precision is away from itself in fp32"
        console.print(told, soft_wrap=True)
    console.print(f"worst parameter: {proof.worst.key}, {proof.worst.absolute:.1e} absolute", soft_wrap=True)
    console.print(_routing_line(proof.routing), soft_wrap=True)
    seconds = f"{proof.seconds[0]:.1f} s in one process, {proof.seconds[1]:.1f} s in the layout"
    verdict = "[green]the layout follows[/green]" if proof.holds else "[red]the layout does not follow[/red]"
    console.print(f"{verdict} one process over {len(proof.layout)} steps ({seconds})", soft_wrap=True)


def _steps_table(proof: Proof) -> Table:
    """Each step's numbers in one process and in the layout, in pairs."""
    table = Table(title="one process and the layout, step by step")
    table.add_column("step", justify="right")
    columns = [name for name in ("loss", "mtp_loss", "grad_norm") if name in proof.differences]
    for name in columns:
        table.add_column(NAMES[name].removeprefix("gradient "), justify="right")
        table.add_column("layout", justify="right")
    for one, other in zip(proof.reference, proof.layout, strict=True):
        cells = [f"{getattr(step, name):.6f}" for name in columns for step in (one, other)]
        table.add_row(str(one.number), *cells)
    return table


def _verdict_table(proof: Proof) -> Table:
    table = Table()
    for title in ("quantity", "largest relative difference", "tolerance", ""):
        table.add_column(title, justify="left" if title in ("quantity", "") else "right")
    allowed = proof.tolerances
    for name, difference in proof.differences.items():
        tolerance = allowed[name]
        table.add_row(NAMES[name], f"{difference:.1e}", f"{tolerance:.1e}", _ok(difference <= tolerance))
    routing = proof.routing
    ties = allowed["ties"]
    table.add_row("routing ties", f"{routing.widest:.1e}", f"{ties:.1e}", _ok(routing.widest <= ties))
    table.add_row("expert loads", "equal" if proof.equal_loads else "differ", "equal", _ok(proof.equal_loads))
    return table


def _ok(holds: bool) -> str:
    return "ok" if holds else "[red]no[/red]"
