"""One process's run of a recipe serves every layout of it: it is done once a module."""

from collections.abc import Callable

import pytest

from megatron_joy.prove.proof import Alone, run_alone
from megatron_joy.prove.shrink import Shrunk, one_process

AloneOf = Callable[[Shrunk], Alone]


@pytest.fixture(scope="module")
def alone_of(tmp_path_factory: pytest.TempPathFactory) -> AloneOf:
    """The run in one process that a small recipe is held against."""
    done: dict[str, Alone] = {}

    def found(small: Shrunk) -> Alone:
        key = one_process(small.recipe).model_dump_json()
        if key not in done:
            done[key] = run_alone(small.recipe, tmp_path_factory.mktemp("alone"))
        return done[key]

    return found
