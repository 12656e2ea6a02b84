"""Where tables are printed."""

import os

from rich.console import Console

WIDE = 200  # columns: more than any table here wants


def console() -> Console:
    """Standard output: a terminal as it is; a file or a pipe with room for every column, unless COLUMNS says how much.

    There rich takes 80 columns for given and cuts cells short.
    """
    made = Console()
    return made if made.is_terminal or "COLUMNS" in os.environ else Console(width=WIDE)
