"""What an executor is: something that has the tasks of a stage done by workers, wherever these run."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

from megatron_joy.errors import UserError, WorkError

ATTEMPTS = 3  # a worker that dies (killed, out of memory) is replaced and its task tried again
Answer = dict[str, Any]  # of one task, as `data_pipeline.worker.attempt` gives it


class Pool(Protocol):
    """Workers of one run. What they do and in which order changes nothing in what is written."""

    def run(self, stage: str, shards: Sequence[int], on_done: Callable[[Answer], None]) -> None:
        """Do these tasks; `on_done` is called in the caller's thread for each. The first error ends the stage.

        Raises UserError or WorkError as the task did, WorkError when workers keep dying of it.
        """

    def close(self, kill: bool = False) -> None:
        """End all workers: after their present task, or at once."""


def raise_failure(answer: Answer) -> NoReturn:
    """Raise the error that an answer tells of."""
    raise (UserError if answer["kind"] == "user" else WorkError)(answer["message"])
