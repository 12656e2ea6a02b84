"""Attempts of a run on this machine, for the supervisor: `joy launch local --restarts N`."""

import os
import platform
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.local import World, check, start
from launch.policy import Ended
from launch.stacks import Stack, collect
from launch.supervise import Supervisor, conclude
from megatron_joy.recipe import Recipe
from megatron_joy.runstate.heartbeat import node_name


@dataclass
class LocalRanks:
    """The ranks' processes and their attempt."""

    world: World
    run: Path
    fence: int

    def running(self) -> bool:
        """Looks after them."""
        return self.world.running()

    def ask_to_stop(self) -> None:
        """SIGTERM to each."""
        self.world.ask_to_stop()

    def kill(self) -> None:
        """SIGKILL to each."""
        self.world.kill()

    def stacks(self) -> list[Stack]:
        """All ranks are here."""
        return collect(self.run, self.fence, node_name())

    def ended(self) -> Ended:
        """What the first failed rank said, or what is known of it; its output goes to its log."""
        self.world.reasons.close()
        failure = self.world.failure
        code = max((abs(code) for code in self.world.exit_codes() if code), default=0)
        if failure is None:
            return Ended(code)
        self.world.keep_output()
        return Ended(code, failure.exit_code, failure.message)


@dataclass
class LocalPlace:
    """This machine: there is nothing else to go to."""

    recipe: Recipe
    recipe_name: str
    overrides: Sequence[str]
    launch: str = field(default_factory=lambda: f"launch {uuid.uuid4().hex[:8]} on {platform.node()}")

    def start(self, fence: int) -> LocalRanks:
        """One process for each rank."""
        world = start(self.recipe, self.recipe_name, self.overrides, fence=fence)
        return LocalRanks(world, Path(self.recipe.run.folder or ""), fence)

    def leave_out(self, nodes: Sequence[str]) -> None:
        """No node is ever to blame here."""

    def move_on(self, failed: bool) -> bool:
        """Never."""
        return False


def run_with_restarts(recipe: Recipe, recipe_name: str, overrides: Sequence[str], restarts: int) -> int:
    """`launch.local.run_local` under the supervisor: 0 when all steps are done, 75 when stopped as asked.

    Raises UserError for a mistake, HopelessError when restarts are pointless or used up.
    """
    check(recipe)
    run = Path(recipe.run.folder or "")
    os.makedirs(run / "logs", exist_ok=True)
    place = LocalPlace(recipe, recipe_name, overrides)
    return conclude(Supervisor(run, place, restarts).supervise())
