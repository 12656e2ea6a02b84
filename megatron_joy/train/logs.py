"""logs/rank_N.log: what this rank's libraries warn of, how it crashed, its stacks on SIGUSR1, and all that a rank other
than 0 prints.
"""

import faulthandler
import logging
import os
import sys
from logging.handlers import MemoryHandler
from types import TracebackType
from typing import IO, Self

from megatron_joy.runstate.stacks import dump_on_signal, ignore_signal
from megatron_joy.train.run import Run

HELD_BACK = 10_000  # records


class RankLog:
    """Warnings and errors of libraries, from the with-block's start; on disk from `open` on.

    Until then they are held back: a run that is refused leaves no file, and nothing but its one line on the terminal.
    """

    def __init__(self) -> None:
        self._held = MemoryHandler(HELD_BACK, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._file: IO[str] | None = None

    def open(self, run: Run) -> None:
        """Writes to the run's logs, each line with time, rank and attempt.

        Rank 0 keeps the terminal for its progress. Of the others everything goes to the log, whatever started them.
        """
        rank = run.process.info.rank
        self._file = log = open(run.folder / "logs" / f"rank_{rank}.log", "a")  # noqa: SIM115 (closed by __exit__)
        handler = logging.StreamHandler(log)
        form = f"%(asctime)s rank {rank} attempt {run.attempt} %(levelname)s %(message)s"
        handler.setFormatter(logging.Formatter(form))
        self._held.setTarget(handler)
        self._held.flush()
        self._held.capacity = 1  # from now on at once
        faulthandler.enable(log)
        dump_on_signal(log)
        if rank:
            sys.stdout.flush()
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self._held)
        logging.captureWarnings(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(self._held)
        if self._file is not None:
            faulthandler.disable()
            ignore_signal()
            self._file.close()
