"""Under mpiexec: of the calls that rank 0 hands out one fails."""

from mpi4py import MPI

from megatron_joy.convert.mpi_workers import crew_of, serve
from megatron_joy.errors import UserError
from tests.convert.sleeper import Sleeper, open_sleeper


def main() -> None:
    comm = MPI.COMM_WORLD
    if comm.rank:
        serve(comm)
        return
    finished: list[str] = []
    with crew_of(comm) as crew, crew(Sleeper(), open_sleeper, None) as pool:
        try:
            pool.each("nap", [("b",), ("a",)], lambda size: None, lambda name, _: finished.append(name))
        except UserError as error:
            print(error)
        pool.each("nap", [("c",)], lambda size: None, lambda name, _: finished.append(name))
    print(", ".join(sorted(finished)), "finished")


if __name__ == "__main__":
    main()
