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

    files = ("a",)
    bytes = 1

    def wait(self, path: Path, advance: Any) -> None:
        """Says who it is and waits to be killed."""
        path.write_text(str(os.getpid()))
        time.sleep(60)

    def nap(self, name: str, advance: Any) -> None:
        """A moment of work, too much for b."""
        advance(1)
        if name == "b":
            self.fail(name, advance)
        time.sleep(0.5)

    def fail(self, name: str, advance: Any) -> None:
        """Refuses."""
        raise UserError(f"{name}: wrong")


@contextmanager
def open_sleeper() -> Iterator[Sleeper]:
    """The opener."""
    yield Sleeper()
