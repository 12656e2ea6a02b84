"""`joy pretrain`: the training process of one rank."""

import sys
from typing import Annotated

import typer

from megatron_joy.recipe import load_recipe

app = typer.Typer()

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped as asked, call again to go on


@app.command("pretrain", epilog="Example: joy pretrain joyai_tiny layout.data_parallel_size=1 run.folder=runs/one")
def pretrain_command(
    recipe: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped name or a TOML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE ...", help="train.steps=100")] = None,
) -> None:
    """Train in the world that a launcher (joy launch, torchrun, srun, mpirun) started, or in this one process.

    The same command goes on with a run that was stopped or killed. Exits 0 when all steps are done, 75 when SIGTERM
    made it checkpoint and leave, 2 on a mistake in recipe or data, 1 when the work failed.
    """
    resolved = load_recipe(recipe, overrides or [])
    from megatron_joy.train.pretrain import pretrain

    if not pretrain(resolved):
        sys.exit(EXIT_STOPPED)
