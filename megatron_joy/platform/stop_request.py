"""A wish to stop, remembered until the loop asks for it. Without torch: it must be heard from the first moment."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

LISTENED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)  # Open MPI and srun pass on SIGUSR2, but not SIGTERM


class StopRequest:
    """Whether SIGTERM, SIGUSR2 or Ctrl-C came. A second Ctrl-C interrupts at once (KeyboardInterrupt)."""

    def __init__(self) -> None:
        self.received = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Hears signals inside the with-block, but none that whoever started the process wants ignored."""
        heard = [number for number in LISTENED if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
