"""A job that does nothing but wait or fail, in a module that a worker imports fast."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_joy.errors import UserError


class Sleeper:
    """What workers are given."""

    def wait(self, path: Path, advance: Any) -> None:
        """Says who it is and waits to be killed."""
        path.write_text(str(os.getpid()))
        time.sleep(60)

    def fail(self, name: str, advance: Any) -> None:
        """Refuses."""
        raise UserError(f"{name}: wrong")


@contextmanager
def open_sleeper() -> Iterator[Sleeper]:
    """The opener."""
    yield Sleeper()
