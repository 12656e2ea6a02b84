"""logs/rank_N.log: what this rank's libraries warn of, how it crashed, and all but rank 0's output."""

import faulthandler
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_joy.train.run import Run


def log_path(folder: Path, rank: int) -> Path:
    """The log of a rank in a run's folder."""
    return folder / "logs" / f"rank_{rank}.log"


@contextmanager
def logging_to_file(run: Run) -> Iterator[None]:
    """Inside the with-block warnings and errors go to this rank's log, each line with time, rank and attempt.

    Rank 0 keeps the terminal for its progress. Of the others everything goes to the log, whatever started them.
    """
    rank = run.process.info.rank
    with open(log_path(run.folder, rank), "a") as log:
        handler = logging.StreamHandler(log)
        form = f"%(asctime)s rank {rank} attempt {run.attempt} %(levelname)s %(message)s"
        handler.setFormatter(logging.Formatter(form))
        logging.getLogger().addHandler(handler)
        logging.captureWarnings(True)
        faulthandler.enable(log)
        if rank:
            sys.stdout.flush()
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
        try:
            yield
        finally:
            faulthandler.disable()
            logging.captureWarnings(False)
            logging.getLogger().removeHandler(handler)
