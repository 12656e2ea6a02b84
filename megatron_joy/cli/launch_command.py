"""`joy launch`: start a run's processes."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_joy.errors import UserError
from megatron_joy.recipe import load_recipe

app = typer.Typer(help="Start a run's processes. Example: joy launch local joyai_tiny")

RENDERED_PORT = 29500

Recipe = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped name or a TOML file.")]
Preflight = Annotated[bool, typer.Option("--preflight", help="Measure the nodes first; start when all are fit.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE ...", help="train.steps=100")]


@app.callback()
def launch() -> None:
    """Start a run's processes. Example: joy launch local joyai_tiny"""


@app.command("local", epilog="Example: joy launch local joyai_tiny train.steps=100 run.folder=runs/short")
def local_command(
    recipe: Recipe,
    overrides: Overrides = None,
    render: Annotated[bool, typer.Option("--render", help="Print each rank's command, start nothing.")] = False,
    fit: Preflight = False,
) -> None:
    """Start every rank of a recipe on this machine and wait for them.

    The same command goes on with a run that was stopped or killed. Ctrl-C and SIGTERM checkpoint and leave (exit 75);
    a second Ctrl-C kills. Rank 0 has the terminal, the others write to logs/rank_N.log in the run's folder.
    """
    from launch import local, preflight

    resolved = load_recipe(recipe, overrides or [])
    if render:
        for rank in range(resolved.layout.world_size):
            variables = local.rank_environment(resolved, rank, RENDERED_PORT)
            prefix = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
            print(prefix, shlex.join(local.rank_command(recipe, overrides or [])))
        return
    if fit:
        preflight.run_here(resolved, recipe, overrides or [])
    sys.exit(local.run_local(resolved, recipe, overrides or []))


@app.command("mpi", epilog="Example: joy launch mpi joyai_tiny --nodes 2 --hosts hosts.txt run.folder=runs/two_nodes")
def mpi_command(
    recipe: Recipe,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes to spread the ranks over.")] = 1,
    hosts: Annotated[Path | None, typer.Option("--hosts", help="File with a host's name a line.")] = None,
    srun: Annotated[str | None, typer.Option("--srun", help="Use `srun --mpi=NAME` (pmi2, pmix, none).")] = None,
    render: Annotated[bool, typer.Option("--render", help="Print the command, start nothing.")] = False,
    fit: Preflight = False,
) -> None:
    """Start every rank of a recipe with mpiexec (MPICH, Intel MPI, Open MPI), or with srun in a Slurm allocation.

    Exit codes and signals are those of `joy launch local`.
    """
    from launch import local, mpi, preflight

    if hosts is not None and srun is not None:
        raise UserError(f"--hosts {hosts}: has no effect with --srun, which takes the allocation's; leave it out")
    resolved = load_recipe(recipe, overrides or [])
    how, ranks = mpi.Mpi(nodes, hosts, srun), local.rank_command(recipe, overrides or [])
    if render:
        print(shlex.join(mpi.prepared(resolved, ranks, how)[0]))
        return
    if fit and (code := mpi.run_mpi(resolved, preflight.rank_command(recipe, overrides or []), how)):
        sys.exit(code)
    sys.exit(mpi.run_mpi(resolved, ranks, how))
