"""The local executor: a pool of worker processes, each the worker command in its serving form."""

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data_pipeline.pool import ATTEMPTS, Answer, raise_failure

RESIDENT_LIMIT = 1_500_000_000  # bytes after which an idle worker is replaced by a fresh one


class Worker:
    """One worker process, started when it is first asked."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._closed = False
        self._process: subprocess.Popen[str] | None = None

    def ask(self, stage: str, shard: int) -> Answer | None:
        """Have a task done; None when the process died of it, or was killed by `stop`."""
        if self._closed:
            return None
        process = self._process = self._process or subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None, "opened with a pipe"
        assert process.stdout is not None, "opened with a pipe"
        try:
            process.stdin.write(f"{stage} {shard}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return None
        answer: Answer = json.loads(line)
        if answer["resident_bytes"] > RESIDENT_LIMIT:
            self.stop()
        return answer

    def stop(self, kill: bool = False) -> int:
        """End the process: after its present task, or at once and for good. Returns its exit code, 0 without one."""
        self._closed = self._closed or kill
        process, self._process = self._process, None
        if process is None:
            return 0
        if kill:
            process.kill()
        assert process.stdin is not None, "opened with a pipe"
        assert process.stdout is not None, "opened with a pipe"
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        code = process.wait()
        process.stdout.close()
        return code


@dataclass
class LocalPool:
    """Runs tasks on `workers` processes; what they do and in which order changes nothing in what is written."""

    pipeline: str
    overrides: Sequence[str]
    workers: int
    _pool: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "data_pipeline.worker", self.pipeline, *self.overrides, "--serve"]
        self._pool = [Worker(command) for _ in range(self.workers)]

    def run(self, stage: str, shards: Sequence[int], on_done: Callable[[Answer], None]) -> None:
        """As Pool.run."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        for shard in shards:
            waiting.put(shard)
        stop = threading.Event()
        count = min(self.workers, len(shards))
        threads = [
            threading.Thread(target=_drive, args=(worker, stage, waiting, answers, stop), daemon=True)
            for worker in self._pool[:count]
        ]
        for thread in threads:
            thread.start()
        failed: Answer | None = None
        finished = 0
        try:
            while finished < len(shards) and failed is None:
                answer = answers.get()
                finished += 1
                if answer["kind"] == "done":
                    on_done(answer)
                else:
                    failed = answer
        finally:
            stop.set()
        for thread in threads:
            thread.join()
        if failed is not None:
            raise_failure(failed)

    def close(self, kill: bool = False) -> None:
        """End all workers."""
        for worker in self._pool:
            worker.stop(kill)


def _drive(
    worker: Worker,
    stage: str,
    waiting: "queue.SimpleQueue[int]",
    answers: "queue.SimpleQueue[Answer]",
    stop: threading.Event,
) -> None:
    """Give one worker task after task until none is left or the stage is stopped."""
    while not stop.is_set():
        try:
            shard = waiting.get_nowait()
        except queue.Empty:
            return
        answers.put(ask_patiently(worker, stage, shard, stop.is_set))


def ask_patiently(worker: Worker, stage: str, shard: int, stopped: Callable[[], bool] = lambda: False) -> Answer:
    """The answer for one task; a worker that dies of it is replaced a few times, unless `stopped` says so."""
    code = attempts = 0
    while attempts < ATTEMPTS and not stopped():
        attempts += 1
        answer = worker.ask(stage, shard)
        if answer is not None:
            return answer
        code = worker.stop()
    cause = f"killed by signal {-code}, out of memory?" if code < 0 else f"exit code {code}, its error is above"
    message = f"stage {stage} shard {shard}: its worker died {attempts} times ({cause}); mend the cause and run again"
    return {"kind": "work", "message": message}
