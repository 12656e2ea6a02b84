"""A rank that follows a script instead of training: `python stub_rank.py SCRIPT.json`, a list of [action, value].

A launcher (`python stub_rank.py --launch RECIPE SCRIPT.json`) of such ranks is here too, for tests that kill it.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from launch.reasons import Reason, tell_launcher
from megatron_joy.platform.rank import rank_info

RANK = rank_info().rank


def note_pid(folder: str) -> None:
    """Leaves this process's id where the test finds it."""
    file = Path(folder) / f"pid_{RANK}"
    file.with_suffix(".new").write_text(str(os.getpid()))
    file.with_suffix(".new").rename(file)


def checkpoint_on_term(code: int) -> None:
    """Leaves with a code when SIGTERM comes, as training does."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))


def tell(reason: list[Any]) -> None:
    """Gives the launcher [exit code, message]."""
    if not tell_launcher(Reason(RANK, *reason)):
        raise SystemExit(99)


def ignores_interrupts(code: int) -> None:
    """Leaves with a code when Ctrl-C would reach this process."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        os._exit(code)


def outlive(path: str) -> None:
    """Waits for the end of the process whose id the file holds."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(Path(path).read_text()))
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.02)


ACTIONS = {
    "note_pid": note_pid,
    "checkpoint_on_term": checkpoint_on_term,
    "ignore_term": lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "tell": tell,
    "ignores_interrupts": ignores_interrupts,
    "sleep": time.sleep,
    "print": lambda text: print(text, flush=True),
    "complain": lambda text: print(text, flush=True, file=sys.stderr),
    "wait_for": lambda path: [time.sleep(0.02) for _ in iter(lambda: Path(path).exists(), True)],
    "outlive": outlive,
    "kill": lambda number: os.kill(os.getpid(), number),
    "exit": lambda code: os._exit(code),
}


def main(arguments: list[str]) -> None:
    """Plays this rank's part."""
    if arguments[0] == "--launch":
        from launch import local
        from megatron_joy.recipe import load_recipe

        local.rank_command = lambda *_: [sys.executable, __file__, arguments[2]]  # type: ignore[assignment]
        local.run_local(load_recipe(arguments[1]), arguments[1], [])
        return
    for action, value in json.loads(Path(arguments[0]).read_text())[RANK]:
        ACTIONS[action](value)  # type: ignore[operator]


if __name__ == "__main__":
    main(sys.argv[1:])
