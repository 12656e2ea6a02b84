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
    restarts: Annotated[int, typer.Option(min=0, help="How often the run may fail or hang and is restarted.")] = 0,
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
    if restarts:
        from launch import local_place

        sys.exit(local_place.run_with_restarts(resolved, recipe, overrides or [], restarts))
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


@app.command("slurm", epilog="Example: joy launch slurm joyai_48b_a3b --nodes 16 --gpus-per-node 8 --site site.toml")
def slurm_command(
    recipe: Recipe,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that train.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of a node; 0: a CPU cluster.")] = 8,
    tasks_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks of a node; default: its GPUs.")] = None,
    spares: Annotated[int, typer.Option(min=0, help="Nodes more, idle until one fails.")] = 0,
    site: Annotated[Path | None, typer.Option(envvar="JOY_SITE", help="The site file (docs/launch.md).")] = None,
    gpu: Annotated[str | None, typer.Option(help="Plan memory for this GPU, as h100-80g; else the site's.")] = None,
    chain: Annotated[bool, typer.Option("--chain", help="One job for each of the recipe's stages.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Submit although memory does not suffice.")] = False,
    render: Annotated[bool, typer.Option("--render", help="Print the script, queue nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value.")] = False,
) -> None:
    """Check a recipe and everything that it needs, then queue it under Slurm.

    Nothing is queued or written unless layout, data, memory and Slurm's own test agree. The job checkpoints before its
    time is up and queues itself again; what fails is restarted, what can't be mended so is not (docs/launch.md).
    """
    from launch import slurm
    from launch.slurm_site import load_site

    known = load_site(site)
    known = known.model_copy(update={"gpu": gpu}) if gpu else known
    request = slurm.Request(recipe, overrides or [], nodes, gpus_per_node, tasks_per_node, known, spares, chain, force)
    if render:
        print(slurm.render(request), end="")
        return
    resolved, jobs, notes = slurm.launch(request)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(slurm.as_json(resolved, jobs, notes) if as_json else slurm.describe(resolved, jobs))
