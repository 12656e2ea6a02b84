"""`joy` under mpiexec, whose last rank is killed when its second file is made, before it can say so."""

import os
import signal
import sys
from itertools import count
from typing import Any

from mpi4py import MPI

from megatron_joy.cli.main import main
from megatron_joy.convert import mpi_workers


def kill_the_last_rank() -> None:
    give, files = mpi_workers._give, count(1)

    def then(comm: Any, rank: int, message: Any) -> None:
        if comm.rank == comm.size - 1 and message[0] == "done" and next(files) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        give(comm, rank, message)

    mpi_workers._give = then


if __name__ == "__main__":
    assert MPI.COMM_WORLD.size > 1
    kill_the_last_rank()
    sys.exit(main(sys.argv[1:]))
