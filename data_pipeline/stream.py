"""Text to shards in one pass, for inputs whose order is good as it is: no shuffle, so nothing is written twice.

`output.shuffle = false` takes this stage in place of `read` and `write`. A task's documents go through its source's
transforms into the encoder and from there into one shard of each split, in the order of the inputs; a shard is as large
as the task's inputs. What needs documents to meet is not there: exact copies stay. A worker holds a batch of text and
the origins of one shard's documents.
"""

from contextlib import ExitStack
from typing import Any

from data_pipeline.encode import Encoder
from data_pipeline.engine import Job, TaskResult
from data_pipeline.read import read_pieces
from data_pipeline.spool import Spooled
from data_pipeline.write import (
    BATCH_BYTES,
    OpenShard,
    Written,
    encoded_checked,
    origins_of,
    shard_prefix,
    shard_result,
    tokenizer_of,
    unpublish,
)
from megatron_joy.data.provenance import DocumentOrigin


def stream_tasks(job: Job) -> int:
    """As many as the plan has, unless documents are shuffled."""
    return 0 if job.pipeline.output.shuffle else len(job.plan.tasks)


class _Half:
    """The shard of one split: documents gather until they are worth encoding."""

    def __init__(self, job: Job, shard: OpenShard) -> None:
        self._job, self._shard = job, shard
        self._waiting: list[Spooled] = []
        self._size = 0
        self.origins: list[DocumentOrigin] = []

    def add(self, document: Spooled) -> None:
        """Take a document."""
        self._waiting.append(document)
        self._size += document.size
        if self._size >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Encode what waits."""
        if not self._waiting:
            return
        self._shard.add([document.view for document in self._waiting])
        self.origins += origins_of(self._job, self._waiting)
        self._waiting, self._size = [], 0

    def close(self) -> Written:
        """Let the shard appear."""
        return self._shard.close()


class _Sink:
    """Gives each document to its split's shard, which the split's first document opens."""

    def __init__(self, job: Job, number: int, encoder: Encoder, stack: ExitStack) -> None:
        self._job, self._number, self._encoder, self._stack = job, number, encoder, stack
        self._vocabulary = tokenizer_of(job).vocab_size
        self._buckets = job.plan.buckets
        self.halves: dict[str, _Half] = {}

    def take(self, document: Spooled) -> None:
        """A document of either split; equal texts are always in the same one."""
        split = self._buckets.split_of_text(document.hash)
        half = self.halves.get(split)
        if half is None:
            prefix = shard_prefix(self._job, split, self._number)
            shard = self._stack.enter_context(OpenShard(prefix, self._encoder, self._vocabulary))
            half = self.halves[split] = _Half(self._job, shard)
        half.add(document)


def _write(job: Job, shard: int, encoder: Encoder) -> TaskResult:
    folder = job.task_folder("stream", shard)
    with ExitStack() as stack:
        sink = _Sink(job, shard, encoder, stack)
        read, files = read_pieces(job, shard, sink.take, folder)
        for half in sink.halves.values():
            half.flush()
        unpublish(job, "stream")
        writes = []
        for split, half in sorted(sink.halves.items()):
            result = shard_result(job, shard_prefix(job, split, shard), half.close(), half.origins, folder)
            nothing: dict[str, Any] = {"dropped": {}, "dropped_bytes": {}, "samples": []}
            writes.append({"split": split, "documents_in": len(half.origins), **nothing, **result.statistics})
            files += result.files
    return TaskResult(files, {"read": read, "writes": writes})


def stream_task(job: Job, shard: int) -> TaskResult:
    """Read, transform, encode and write the pieces of one task; a split without documents gives no shard."""
    return encoded_checked(job, f"shard_{shard:05d}", lambda encoder: _write(job, shard, encoder))
