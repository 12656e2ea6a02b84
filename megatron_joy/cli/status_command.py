"""`joy status RUN`: where a run stands."""

import time
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.live import Live

from megatron_joy.errors import UserError
from megatron_joy.report.status import read_status, render_status

_REFRESH_SECONDS = 2.0
_OVER = ("finished", "stopped", "failed")


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the status as JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every two seconds until the run is over.")] = False,
) -> None:
    """Shows step, loss, throughput, time left, last checkpoint, attempts and last events of a run.

    Example: joy status runs/joyai_tiny --watch
    """
    if as_json and watch:
        raise UserError("joy status: --json prints once and --watch goes on; give one of them")
    status = read_status(run, now=time.time())
    if as_json:
        print(orjson.dumps(status.as_json(), option=orjson.OPT_INDENT_2).decode())
        return
    console = Console()
    if not watch:
        console.print(render_status(status))
        return
    with Live(render_status(status), console=console, auto_refresh=False) as live:
        while status.state not in _OVER:
            time.sleep(_REFRESH_SECONDS)
            status = read_status(run, now=time.time())
            live.update(render_status(status), refresh=True)
