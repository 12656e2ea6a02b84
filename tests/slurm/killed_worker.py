"""`python -m data_pipeline.worker` that SIGKILL ends when half of its shard is on the disk: same arguments.

With JOY_TEST_WAIT in the environment it stops there instead, until somebody else kills it.
"""

import os
import signal
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.worker import run
from megatron_joy.data.shards import ShardWriter
from megatron_joy.errors import exit_code

whole = ShardWriter.add


def half_and_die(writer: ShardWriter, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.integer[Any]]) -> None:
    """Adds half of the documents; nothing is flushed or tidied up after that."""
    first = lengths[: len(lengths) // 2]
    whole(writer, tokens[: int(first.sum())], first)
    writer._stream.flush()
    if "JOY_TEST_WAIT" in os.environ:
        signal.pause()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    ShardWriter.add = half_and_die  # type: ignore[method-assign]
    sys.exit(exit_code(run, sys.argv[1:]))
