"""`joy pretrain` with mishaps: `python -m tests.slurm.planted_rank pretrain ...`.

JOY_PLANTED holds JSON: number of an attempt -> [rank, update, action]; the action is done just before the update.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import cast

from megatron_joy.cli.main import main
from megatron_joy.platform.stop_request import StopRequest
from megatron_joy.runstate import FENCE_VARIABLE

PATIENCE = 60.0


def until_asked_to_stop() -> None:
    """Returns when what asks a rank to checkpoint has come: within this update, however slow the machine."""
    request = cast(MethodType, signal.getsignal(signal.SIGTERM)).__self__
    assert isinstance(request, StopRequest)
    end = time.monotonic() + PATIENCE
    while not request.received and time.monotonic() < end:
        time.sleep(0.05)


def time_is_up() -> None:
    """What Slurm sends the batch script before the time is up."""
    subprocess.run(["scancel", "--batch", "--signal=USR1", os.environ["SLURM_JOB_ID"]], check=True)
    until_asked_to_stop()


def freeze() -> None:
    """SIGSTOP, as from outside."""
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_for_the_worst() -> None:
    """Tells the test that it is time, and goes on with the update when it has come."""
    Path(os.environ["JOY_PLANTED_MARK"]).write_text(os.environ["SLURMD_NODENAME"])
    until_asked_to_stop()


ACTIONS: dict[str, Callable[[], None]] = {
    "time is up": time_is_up,
    "freeze": freeze,
    "wait": wait_for_the_worst,
}

if __name__ == "__main__":
    mishap = json.loads(os.environ["JOY_PLANTED"]).get(os.environ[FENCE_VARIABLE])
    if mishap is not None:
        from tests.train.minuscule import at_step

        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        rank, step, action = mishap
        at_step(step, ACTIONS[action], rank)
        del os.environ["RANK"]
    sys.exit(main())
