"""`joy report RUN`: the run's report as one HTML page."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import orjson
import typer

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


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the run's summary and the page's path as JSON.")
    ] = False,
) -> None:
    """Writes RUN/report.html, one page that needs nothing but a browser, and prints its path.

    The run may go on meanwhile. Example: joy report runs/joyai_tiny
    """
    now = time.time()
    with _progress() as progress:
        log = read_run(run, now=now, progress=progress)
    summary = summarize(log)
    path = write_page(log, summary, now)
    if as_json:
        print(orjson.dumps({"report": str(path)} | summary.as_json(), option=orjson.OPT_INDENT_2).decode())
    else:
        print(path)
