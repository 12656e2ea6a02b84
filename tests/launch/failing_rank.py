"""`joy pretrain` in which rank 1 has a bug that shows in the third step: `python -m tests.launch.failing_rank ...`."""

import os
import sys
from typing import Any

from megatron_joy.cli.main import main


def plant() -> None:
    """Makes rank 1 raise."""
    from megatron_joy.train.step import Trainer

    compute = Trainer.step

    def then(trainer: Any, number: int, batches: Any) -> Any:
        if number == 3:
            raise LookupError("a bug that only rank 1 has")
        return compute(trainer, number, batches)

    Trainer.step = then  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        plant()
    sys.exit(main())
