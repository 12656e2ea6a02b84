"""`joy preflight`: are the nodes fit for a run, measured by its ranks."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch import preflight
from launch.reasons import Reason, tell_launcher
from megatron_joy.errors import UserError, WorkError
from megatron_joy.platform.rank import rank_info
from megatron_joy.recipe import check_run_folder, load_recipe
from megatron_joy.report import text

app = typer.Typer()
EXIT_UNFIT = 1


@app.command("preflight", epilog="Example: joy preflight joyai_tiny layout.data_parallel_size=2")
def preflight_command(
    recipe: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped name or a TOML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE ...", help="train.steps=100")] = None,
    patience: Annotated[float, typer.Option("--patience", min=1.0, help="Seconds to wait for ranks.")] = 120.0,
    slow: Annotated[
        float | None, typer.Option("--slow", min=1.0, help="A product this many times the median is bad.")
    ] = None,
    clock: Annotated[float, typer.Option("--clock", min=0.0, help="Seconds that clocks may differ.")] = 1.0,
    bandwidth: Annotated[
        float | None, typer.Option("--bandwidth", min=0.0, help="GB/s expected of the largest all-reduce.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
) -> None:
    """Measure every node of a run and name those that are unfit; the verdict is logs/preflight.json of the run.

    Inside a world that a launcher started (srun, mpiexec, torchrun) this is one of its ranks; else the recipe's ranks
    are started on this machine. Exits 0 when all nodes are fit, 1 when one is not.
    """
    resolved = load_recipe(recipe, overrides or [])
    info = rank_info()
    if info.launcher == "none" and resolved.layout.world_size > 1:
        limits = {"slow": slow, "bandwidth": bandwidth, "patience": patience, "clock": clock}
        options = [f"--{name}={value}" for name, value in limits.items() if value is not None]
        options += ["--json"] if as_json else []
        preflight.run_here(resolved, recipe, overrides or [], options)
        return
    try:
        if info.world_size != resolved.layout.world_size:
            raise UserError(
                f"preflight: {info.world_size} ranks were started, the recipe's layout has {resolved.layout.world_size}"
            )
        check_run_folder(resolved)
        verdict = _verdict(str(resolved.run.folder), patience, preflight.Limits(slow, clock, _bytes(bandwidth)))
    except (UserError, WorkError) as error:
        code = 2 if isinstance(error, UserError) else EXIT_UNFIT
        if tell_launcher(Reason(info.rank, code, str(error))):
            sys.exit(code)
        raise
    if info.rank == 0:
        preflight.write_verdict(Path(str(resolved.run.folder)), verdict)
        _show(verdict, as_json)
    if not verdict["ok"]:
        line = preflight.summary(verdict)
        if tell_launcher(Reason(info.rank, EXIT_UNFIT, line)) or info.rank:
            sys.exit(EXIT_UNFIT)
        raise WorkError(line)


def _bytes(gigabytes: float | None) -> float | None:
    return None if gigabytes is None else gigabytes * 1e9


def _verdict(folder: str, patience: float, limits: preflight.Limits) -> dict[str, Any]:
    from megatron_joy.platform.health import measure

    return preflight.judge(measure(folder, patience), limits)


def _show(verdict: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(verdict, indent=2))
        return
    console = Console(soft_wrap=True, highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("node", "ranks", "verdict"):
        table.add_column(name)
    for node, found in verdict["nodes"].items():
        said = "[green]fit[/]" if found["ok"] else "[red]unfit[/]: " + escape("; ".join(found["reasons"]))
        table.add_row(escape(node), _ranges(found["ranks"]), said)
    console.print(table)
    measured = verdict["measured"]
    console.print(
        f"matrix product: {measured['product_flops']['median'] / 1e9:,.1f} GFLOP/s a rank, the slowest "
        f"{measured['product_flops']['least'] / 1e9:,.1f}; clocks within {abs(measured['clock_seconds']):.4f} s; "
        f"4 MiB written in {measured['write_seconds']:.3f} s, read in {measured['read_seconds']:.3f} s"
    )
    for kind, sizes in measured["collectives"].items():
        told = ", ".join(f"{text.size(size['bytes'])} {size['bus'] / 1e9:.2f} GB/s" for size in sizes)
        console.print(f"{kind.replace('_', '-')}, bandwidth on the bus: {told}")


def _ranges(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
