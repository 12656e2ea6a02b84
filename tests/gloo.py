"""Gloo worlds for tests: `run_world(function, world_size, *args)`, a thin form of `megatron_joy.platform.world`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_joy.platform import world

LOG_TAIL = 3000  # characters of a rank's log in an error


class WorldFailed(AssertionError):
    """A rank raised, died or ran out of time. `rank` is the first one, `error` what it said, `exit_code` if it died."""

    def __init__(self, rank: int, error: str, log: str, exit_code: int | None = None) -> None:
        super().__init__(f"rank {rank}: {error}\n--- end of its log ---\n{log[-LOG_TAIL:]}")
        self.rank, self.error, self.exit_code = rank, error, exit_code


def run_world(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    environment: dict[str, str] | None = None,
    log_folder: Path | None = None,
) -> list[Any]:
    """Calls `function(*args)` on each of `world_size` ranks, ready for `platform.process.start`; results in rank order.

    Each rank has one thread, `RANK` and its like, what `environment` adds, and a log `rank_N.log` in `log_folder`.
    Raises WorldFailed for the first rank that raises, dies or hasn't finished after `timeout` seconds; all are killed.
    """
    try:
        return world.run_world(
            function, world_size, *args, patience=timeout, environment=environment, log_folder=log_folder
        )
    except world.WorldFailed as failed:
        raise WorldFailed(failed.rank, f"{failed.error}\n{failed.details}", failed.log, failed.exit_code) from None
