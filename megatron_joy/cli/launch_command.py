"""`joy launch`: start a run's processes."""

import shlex
import sys
from typing import Annotated

import typer

from megatron_joy.recipe import load_recipe

app = typer.Typer(help="Start a run's processes. Example: joy launch local joyai_tiny")

RENDERED_PORT = 29500

Recipe = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped name or a TOML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE ...", help="train.steps=100")]


@app.callback()
def launch() -> None:
    """Start a run's processes. Example: joy launch local joyai_tiny"""


@app.command("local", epilog="Example: joy launch local joyai_tiny train.steps=100 run.folder=runs/short")
def local_command(
    recipe: Recipe,
    overrides: Overrides = None,
    render: Annotated[bool, typer.Option("--render", help="Print each rank's command, start nothing.")] = False,
) -> None:
    """Start every rank of a recipe on this machine and wait for them.

    The same command goes on with a run that was stopped or killed. Ctrl-C and SIGTERM checkpoint and leave (exit 75);
    a second Ctrl-C kills. Rank 0 has the terminal, the others write to logs/rank_N.log in the run's folder.
    """
    from launch import local

    resolved = load_recipe(recipe, overrides or [])
    if render:
        for rank in range(resolved.layout.world_size):
            variables = local.rank_environment(resolved, rank, RENDERED_PORT)
            prefix = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
            print(prefix, shlex.join(local.rank_command(recipe, overrides or [])))
        return
    sys.exit(local.run_local(resolved, recipe, overrides or []))
