"""The Ray executor: actors, each keeping one worker command running on whatever node Ray gave it.

Ray starts and places them and replaces those whose node is gone; the work is the worker command's. All nodes see the
inputs and the output folder under the same paths and have this package installed. With RAY_ADDRESS set the run joins
that cluster, else Ray is started on this machine and ends with the run.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from data_pipeline.local import Worker, ask_patiently
from data_pipeline.pool import ATTEMPTS, Answer, raise_failure
from megatron_joy.errors import UserError, WorkError

ADDRESS = "RAY_ADDRESS"


class Station:
    """What runs in an actor: one worker process, started in the folder that the run was started in."""

    def __init__(self, arguments: Sequence[str], folder: str) -> None:
        os.chdir(folder)
        self._worker = Worker([sys.executable, "-m", "data_pipeline.worker", *arguments])

    def ask(self, stage: str, shard: int) -> Answer:
        """Have a task done; a worker process that dies of it is replaced a few times."""
        return ask_patiently(self._worker, stage, shard)

    def stop(self) -> None:
        """End the worker process."""
        self._worker.stop()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray: ray is not installed; pip install 'megatron-joy[ray]'") from None
    return ray


class RayPool:
    """`workers` actors, by default as many as the cluster has CPUs. Ray starts with the first task."""

    def __init__(self, pipeline: str, overrides: Sequence[str], workers: int | None) -> None:
        self._ray = _ray()
        self._arguments = [pipeline, *overrides, "--serve"]
        self._workers = workers
        self._started: list[Any] = []

    def _actors(self) -> list[Any]:
        ray = self._ray
        if self._started:
            return self._started
        try:
            if ADDRESS in os.environ:
                ray.init()
            else:
                ray.init(num_cpus=self._workers, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"--executor ray: {str(error).splitlines()[0]}; mend {ADDRESS} or what it names") from None
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=ATTEMPTS)(Station)
        count = self._workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._started = [actor.remote(self._arguments, os.getcwd()) for _ in range(count)]
        return self._started

    def run(self, stage: str, shards: Sequence[int], on_done: Callable[[Answer], None]) -> None:
        """As Pool.run."""
        waiting = list(reversed(shards))
        free = list(self._actors())
        asked: dict[Any, Any] = {}
        while waiting or asked:
            while waiting and free:
                actor = free.pop()
                asked[actor.ask.remote(stage, waiting.pop())] = actor
            (done,), _ = self._ray.wait(list(asked), num_returns=1)
            free.append(asked.pop(done))
            try:
                answer: Answer = self._ray.get(done)
            except self._ray.exceptions.RayError as error:
                line = str(error).splitlines()[0]
                raise WorkError(f"stage {stage}: Ray lost a worker for good ({line}); run again") from None
            if answer["kind"] != "done":
                raise_failure(answer)
            on_done(answer)

    def close(self, kill: bool = False) -> None:
        """End the actors and what this run started of Ray."""
        if not self._started:
            return
        if not kill:
            self._ray.get([actor.stop.remote() for actor in self._started])
        for actor in self._started:
            self._ray.kill(actor)
        self._ray.shutdown()
