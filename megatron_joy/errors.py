"""The two ways a command may fail. The command line maps them to exit codes 2 and 1 without a traceback."""


class UserError(Exception):
    """A mistake in what the user gave us: one line that names the thing, what was found, what was expected, one fix.

    The command line prints it on stderr and exits with 2. Raise it before anything is written.
    """


class WorkError(Exception):
    """The input was right but the work failed (a full disk, a lost rank): one line, exit code 1."""


class HopelessError(WorkError):
    """The work failed and would fail the same way again: exit code 93, which says "do not restart"."""
