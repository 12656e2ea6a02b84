"""How long work tells how far it is: phases, each with a number of bytes (or none) to go through."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]  # is told the bytes done since the last call
Phases = Callable[[str, int | None], Advance]  # begins a phase: its name and its bytes, None where they aren't known


def silent(name: str, total: int | None) -> Advance:
    """Shows nothing."""
    return lambda done: None


@contextmanager
def shown_phases() -> Iterator[Phases]:
    """One bar per phase on stderr while the block runs; nothing when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def begin(name: str, total: int | None) -> Advance:
            for task in bars.tasks:
                bars.update(task.id, visible=False)
            task_id = bars.add_task(name, total=total)
            return lambda done: bars.advance(task_id, done)

        yield begin
