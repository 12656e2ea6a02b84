"""The console script `joy`: finds the command, runs it, and turns its outcome into an exit code.

0: done. 2: a user's mistake, one line on stderr for each. 1: the work failed. 93: it would fail the same way again.
130: interrupted. A command's module is
imported only when the command is called, so that `joy --help` is quick and torch-free commands need no torch.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.exceptions import Abort, TyperException

from megatron_joy import __version__
from megatron_joy.errors import HopelessError, UserError, WorkError

DONE, WORK_FAILED, USER_MISTAKE, HOPELESS, INTERRUPTED = 0, 1, 2, 93, 130


@dataclass(frozen=True)
class Command:
    """Where a command lives and what it does, in a line."""

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    name: Command(f"megatron_joy.cli.{name}_command", text)
    for name, text in {
        "doctor": "what this machine has, what is missing, and how to get it",
        "recipe": "list and show recipes, their keys and their parameter counts",
        "data": "from text to shards; verify, inspect and trace them",
        "tokenizer": "train a tokenizer",
        "plan": "what a run will do: its stages, and what it reads of each source",
        "prove": "a recipe's layout in small on CPU against one process",
        "preflight": "are the nodes fit for a run: versions, GPUs, network, files, clocks",
        "pretrain": "the training process itself (what launchers start on each rank)",
        "launch": "start a run on this machine, under Slurm or under MPI",
        "status": "where a run stands",
        "report": "a run's report as one HTML page",
        "checkpoint": "list, verify and prune a run's checkpoints",
        "convert": "to and from Hugging Face's format",
        "generate": "write text with a checkpoint",
    }.items()
}


def help_text() -> str:
    """What `joy` prints without arguments."""
    width = max(map(len, COMMANDS))
    rows = (f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    lines = [
        "Usage: joy COMMAND ...",
        "",
        "The pretraining stack behind JoyAI-LLM Flash, on Megatron-core.",
        "",
        "Commands:",
        *rows,
        "",
        "`joy COMMAND --help` says more. Example: joy recipe show joyai_tiny --size",
    ]
    return "\n".join(lines)


def load_command(name: str) -> Any:
    """The typer command behind a name.

    Its module has a function `command`, or `app`: a group, or a single command when the only one in it is called like
    the group (a group of one keeps its subcommand, as in `joy tokenizer train`).
    """
    module = importlib.import_module(COMMANDS[name].module)
    root = typer.Typer(add_completion=False)
    # With a callback typer keeps the name as a subcommand, so that messages say `joy recipe show`.
    root.callback()(lambda: None)
    if not hasattr(module, "app"):
        root.command(name)(module.command)
    elif single := _single_command(module.app, name):
        single.name = name
        root.registered_commands.append(single)
    else:
        root.add_typer(module.app, name=name)
    return typer.main.get_command(root)


def _single_command(app: typer.Typer, name: str) -> Any:
    """The app's only command if it is called like the app, else None."""
    if len(app.registered_commands) != 1 or app.registered_groups or app.registered_callback:
        return None
    (only,) = app.registered_commands
    called = only.name or getattr(only.callback, "__name__", "")
    return only if called in (name, "command") else None


def _usage_line(error: TyperException) -> str:
    """A wrong call as one line with the way to the right one."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "joy"
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{path}: {message}; see `{path} --help`"


def _run(name: str, arguments: Sequence[str]) -> int:
    command = load_command(name)
    target = command.commands[name]
    bare_group = not arguments and hasattr(target, "commands") and not target.invoke_without_command
    result = command.main(
        args=[name, *(["--help"] if bare_group else arguments)], prog_name="joy", standalone_mode=False
    )
    return result if isinstance(result, int) else DONE


def _fail(code: int, message: str) -> int:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code


def dispatch(arguments: Sequence[str]) -> int:
    """Run `joy` with these arguments and give its exit code; errors of a user are raised as UserError."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(help_text())
        return DONE
    name, *rest = arguments
    if name == "--version":
        print(f"megatron-joy {__version__}")
        return DONE
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        fix = f"the nearest is `joy {near[0]}`" if near else f"commands are {', '.join(COMMANDS)}"
        raise UserError(f"joy {name}: no such command; {fix}")
    return _run(name, rest)


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; gives the exit code."""
    try:
        code = dispatch(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()  # a full disk behind it must be told while something can
        return code
    except UserError as error:
        return _fail(USER_MISTAKE, str(error))
    except WorkError as error:
        return _fail(HOPELESS if isinstance(error, HopelessError) else WORK_FAILED, str(error))
    except TyperException as error:
        return _fail(USER_MISTAKE, _usage_line(error))
    except (KeyboardInterrupt, Abort):
        return INTERRUPTED
    except BrokenPipeError:  # the reader (head, less) has gone
        _forget_output()
        return WORK_FAILED
    except OSError as error:  # a full disk, a folder that may not be entered: the place says more than a stack
        _forget_output()
        return _fail(WORK_FAILED, f"{error.filename or 'writing'}: {error.strerror or error}; mend it and run again")


def _forget_output() -> None:
    """What could not be written: the interpreter's last flush must not complain about it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
