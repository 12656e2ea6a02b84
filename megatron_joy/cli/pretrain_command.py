"""`joy pretrain`: the training process of one rank."""

import datetime
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from launch.reasons import Reason, keep_stderr, launcher_reads_marks, tell_launcher
from megatron_joy.errors import HopelessError, UserError, WorkError
from megatron_joy.platform.rank import rank_info
from megatron_joy.platform.stop_request import StopRequest
from megatron_joy.recipe import Recipe, load_recipe
from megatron_joy.runstate.stacks import dump_on_signal

app = typer.Typer()

EXIT_FAILED, EXIT_USER_MISTAKE, EXIT_HOPELESS = 1, 2, 93
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped as asked, call again to go on


@app.command("pretrain", epilog="Example: joy pretrain joyai_tiny layout.data_parallel_size=1 run.folder=runs/one")
def pretrain_command(
    recipe: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped name or a TOML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE ...", help="train.steps=100")] = None,
) -> None:
    """Train in the world that a launcher (joy launch, torchrun, srun, mpirun) started, or in this one process.

    The same command goes on with a run that was stopped or killed. Exits 0 when all steps are done, 75 when SIGTERM or
    Ctrl-C made it checkpoint and leave, 2 on a mistake in recipe or data, 1 when the work failed, 93 when
    it would fail the same way again.
    """
    keep_stderr()
    dump_on_signal(sys.stderr)  # until the rank's log is open
    try:
        done = _pretrain(recipe, overrides or [])
    except (UserError, WorkError) as error:
        kinds = {UserError: EXIT_USER_MISTAKE, HopelessError: EXIT_HOPELESS}
        code = next((code for kind, code in kinds.items() if isinstance(error, kind)), EXIT_FAILED)
        if tell_launcher(Reason(rank_info().rank, code, str(error))):
            sys.exit(code)  # the launcher says it, once for all ranks
        raise
    if not done:
        # mpiexec takes any code but 0 for a failure, and kills ranks that are still writing.
        stopped = Reason(rank_info().rank, EXIT_STOPPED, "stopped as asked")
        sys.exit(0 if launcher_reads_marks() and tell_launcher(stopped) else EXIT_STOPPED)


def _pretrain(recipe: str, overrides: Sequence[str]) -> bool:
    with StopRequest().listening() as stop:
        resolved = load_recipe(recipe, overrides)
        try:
            from megatron_joy.train.pretrain import pretrain

            return pretrain(resolved, stop)
        except UserError:
            raise
        except WorkError as error:
            with suppress(OSError):
                _append(resolved, f"WorkError: {error}", begin=False)
            raise
        except Exception as error:
            raise WorkError(_logged(error, resolved)) from error


def _logged(error: Exception, recipe: Recipe) -> str:
    """Puts an unforeseen error's traceback into the rank's log; a line that says what and where."""
    what = f"rank {rank_info().rank}: " + " ".join(f"{type(error).__name__}: {error}".split())
    text = traceback.format_exc()
    try:
        return f"{what}; the traceback is in {_append(recipe, text)}"
    except OSError as full:
        print(text, file=sys.stderr)
        return f"{what} (its traceback is above: {full.filename} can't be written: {full.strerror})"


def _append(recipe: Recipe, text: str, begin: bool = True) -> Path:
    """Puts why this rank failed into its log, for `joy status` to find; `begin`: also where there is no log yet."""
    rank = rank_info().rank
    log = Path(recipe.run.folder or "") / "logs" / f"rank_{rank}.log"
    now = datetime.datetime.now().isoformat(sep=" ", timespec="milliseconds")
    if begin:
        log.parent.mkdir(parents=True, exist_ok=True)
    if begin or log.exists():
        with open(log, "a") as stream:
            stream.write(f"{now} rank {rank} failed\n{text.rstrip()}\n")
    return log
