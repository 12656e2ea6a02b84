"""Are a job's nodes fit: `joy preflight` as a step of its own before the first attempt. Standard library only."""

import json
from pathlib import Path
from typing import Any

from launch.policy import EXIT_USER_MISTAKE
from launch.slurm_ranks import SlurmPlace
from launch.supervise import say
from megatron_joy.errors import UserError, WorkError
from megatron_joy.runstate import VERDICT_FILE

WHY = "the lines above say why"


def unfit_nodes(file: Path) -> dict[str, str]:
    """The nodes that a verdict names, each with its first reason; none where there is no verdict."""
    try:
        verdict: dict[str, Any] = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    return {node: found["reasons"][0] for node, found in verdict["nodes"].items() if not found["ok"]}


def find_fit_nodes(place: SlurmPlace, run: Path) -> bool:
    """Measures nodes until all that an attempt would have are fit; unfit ones are left out and spares take their place.

    False when too few are left and the job was requeued without them. Raises WorkError when the measuring fails and no
    node is to blame, UserError when the ranks refused the recipe.
    """
    file = run / VERDICT_FILE
    while True:
        file.unlink(missing_ok=True)
        code = place.measure()
        if code == 0:
            say("preflight: all nodes are fit")
            return True
        if code == EXIT_USER_MISTAKE:
            raise UserError(f"preflight: the ranks refused the recipe; {WHY}")
        unfit = unfit_nodes(file)
        if not unfit:
            raise WorkError(f"preflight: left with exit code {code}, and no node is to blame; {WHY}")
        for node, reason in unfit.items():
            say(f"preflight: {node} is left out: {reason}")
        place.leave_out(list(unfit))
        if place.move_on(failed=True):
            say(f"preflight: the job is requeued without {', '.join(unfit)}")
            return False
