"""`joy report RUN`: the run's report as one HTML page."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import orjson
import typer

from megatron_joy.data.atomic import write_atomically
from megatron_joy.errors import UserError
from megatron_joy.report.fit import BAND, fit_law, read_points
from megatron_joy.report.fit_page import fit_page
from megatron_joy.report.html import write_page
from megatron_joy.report.metrics import Progress
from megatron_joy.report.runlog import read_run
from megatron_joy.report.summary import summarize


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar on stderr while a long metrics.jsonl is read, when stderr is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with Bar(
        "reading metrics",
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("reading")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _fit(runs: list[Path], out: Path, as_json: bool) -> None:
    """Fits loss against compute and writes the page."""
    points, kind = read_points(runs)
    fit = fit_law(points, kind)
    write_atomically(out, fit_page(fit).encode())
    constants = {name: [getattr(fit.law, name), *fit.interval(name)] for name in ("floor", "scale", "alpha")}
    if as_json:
        rows = [asdict(point) for point in points]
        value = {"report": str(out), "loss": kind, "band_percentiles": BAND, "constants": constants, "runs": rows}
        print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())
        return
    for name, (best, low, high) in constants.items():
        print(f"{name:<6} {best:.4g}  ({low:.4g} to {high:.4g})")
    print(out)


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="The run's folder; with --fit several.")],
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit loss against compute over the runs: L = E + A / C^alpha.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Where --fit writes its page; else fit.html.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the run's summary and the page's path as JSON.")
    ] = False,
) -> None:
    """Writes RUN/report.html, one page that needs nothing but a browser, and prints its path.

    The run may go on meanwhile. Examples: joy report runs/joyai_tiny; joy report --fit runs/ladder_*
    """
    if fit:
        _fit(runs, out or Path("fit.html"), as_json)
        return
    if len(runs) > 1 or out is not None:
        what = "--out" if out is not None else f"{len(runs)} runs"
        raise UserError(f"joy report: {what} needs --fit; a run's report is one page in its folder")
    now = time.time()
    with _progress() as progress:
        log = read_run(runs[0], now=now, progress=progress)
    summary = summarize(log)
    path = write_page(log, summary, now)
    if as_json:
        print(orjson.dumps({"report": str(path)} | summary.as_json(), option=orjson.OPT_INDENT_2).decode())
    else:
        print(path)
