"""`joy status RUN`: where a run stands."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.live import Live

from megatron_joy.cli.tables import console as wide_console
from megatron_joy.errors import UserError
from megatron_joy.report.status import read_status, render_errors, render_status

_REFRESH_SECONDS = 2.0
_OVER = ("finished", "stopped", "failed")


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the status as JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every two seconds until the run is over.")] = False,
    errors: Annotated[bool, typer.Option("--errors", help="Show why the newest attempt failed, by rank.")] = False,
) -> None:
    """Shows step, loss, throughput, time left, restarts, last checkpoint, queue, and why a run failed.

    Example: joy status runs/joyai_tiny --watch
    """
    if watch and (as_json or errors):
        raise UserError(
            f"joy status: {'--json' if as_json else '--errors'} prints once and --watch goes on; give one of them"
        )
    status = read_status(run, now=time.time())
    if as_json:
        print(orjson.dumps(status.as_json(), option=orjson.OPT_INDENT_2).decode())
        return
    console = wide_console()
    if errors:
        found = status.errors
        console.print(render_errors(found, details=True) if found else "no rank failed in the newest attempt")
        return
    if not watch:
        console.print(render_status(status))
        return
    with suppress(KeyboardInterrupt), Live(render_status(status), console=console, auto_refresh=False) as live:
        # A failed run whose job is still in the queue is about to be restarted.
        while status.state not in _OVER or status.job is not None:
            time.sleep(_REFRESH_SECONDS)
            status = read_status(run, now=time.time())
            live.update(render_status(status), refresh=True)
