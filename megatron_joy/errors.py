"""The ways a command may fail. The command line maps them to exit codes 2, 1 and 93 without a traceback."""

import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """A mistake in what the user gave us: one line that names the thing, what was found, what was expected, one fix.

    The command line prints it on stderr and exits with 2. Raise it before anything is written.
    """


class WorkError(Exception):
    """The input was right but the work failed (a full disk, a lost rank): one line, exit code 1."""


class HopelessError(WorkError):
    """The work failed and would fail the same way again: exit code 93, which says "do not restart"."""


def exit_code(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Runs a small program: its own exit code, or 2 on a mistake, 1 on failed work, each with one line on stderr."""
    try:
        return command(arguments)
    except (UserError, WorkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
