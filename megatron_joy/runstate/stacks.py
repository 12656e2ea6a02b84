"""Where a process hangs: SIGUSR1 makes it write the stacks of all its threads, also from within a blocked call.

SIGVTALRM makes it do so and end: what was stopped by somebody, and has been given up, must not go on when it is woken.
Nobody else sends that one, and its default action leaves no core file; SIGUSR2 asks for a stop (platform/stop_request).
"""

import faulthandler
import signal
from typing import IO

SIGNAL, LAST_SIGNAL = signal.SIGUSR1, signal.SIGVTALRM
HEAD = "Current thread"  # faulthandler's, of the thread that got the signal


def dump_on_signal(stream: IO[str]) -> None:
    """From now on the signals write this process's stacks to a stream, which must stay open."""
    faulthandler.register(SIGNAL, file=stream, all_threads=True, chain=False)
    faulthandler.register(LAST_SIGNAL, file=stream, all_threads=True, chain=True)  # to the default action: the end


def ignore_signal() -> None:
    """No stacks any more; the first signal must not end the process either."""
    faulthandler.unregister(SIGNAL)
    faulthandler.unregister(LAST_SIGNAL)
    signal.signal(SIGNAL, signal.SIG_IGN)
