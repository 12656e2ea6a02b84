"""Messages of an MPI job in which rank 0 hands out work and the others do it.

Waiting ranks sleep between looks for a message: MPI itself would keep a core busy meanwhile.
"""

import time
from typing import Any

from megatron_joy.errors import UserError

TAG = 7
NAP_S = 0.005


def world(command: str) -> Any:
    """MPI's world of `command --executor mpi`.

    Raises UserError where mpi4py or an MPI library is missing, or only one rank was started.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise UserError(
            f"--executor mpi: mpi4py cannot be loaded ({line}); pip install 'megatron-joy[mpi]', or mpi4py for your MPI"
        ) from None
    if MPI.COMM_WORLD.size < 2:
        raise UserError(
            "--executor mpi: one rank only, expected one that hands out tasks and others that do them; start it as "
            f"`mpiexec -n 9 {command} --executor mpi` (or srun)"
        )
    return MPI.COMM_WORLD


def send(comm: Any, rank: int, content: bytes) -> None:
    """Give a message to a rank."""
    comm.Send(content, dest=rank, tag=TAG)


def receive(comm: Any) -> tuple[int, bytearray]:
    """The next message from any rank, and which rank that was."""
    from mpi4py import MPI

    status = MPI.Status()
    while not comm.Iprobe(source=MPI.ANY_SOURCE, tag=TAG, status=status):
        time.sleep(NAP_S)
    content = bytearray(status.Get_count(MPI.BYTE))
    comm.Recv(content, source=status.Get_source(), tag=TAG)
    return status.Get_source(), content
