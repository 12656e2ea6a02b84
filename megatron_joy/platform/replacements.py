"""Every place where something of Megatron-core is replaced, and why; `tests/platform` checks that each still exists.

Four occasions: without a GPU (`cpu.REPLACEMENTS`, `cpu.REWRITES`), always (`ALWAYS`: a defect of Megatron-core on
every platform), only while a model is being built (`BUILDING`: extension points that Megatron-core lacks), and in
classes of ours that are derived from Megatron-core's (`OVERRIDDEN`).
"""

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rebinding:
    """A global name of a Megatron-core module and why ours stands there."""

    module: str
    name: str
    reason: str


MTP_LOSS = Rebinding(
    "megatron.core.models.hybrid.hybrid_model",
    "process_mtp_loss",
    "divides the MTP loss by each micro-batch's and each context-parallel rank's own token count, so that the gradient "
    "depends on the layout; with rows that aren't packed its shifted mask crosses document borders",
)
ALWAYS: tuple[Rebinding, ...] = (MTP_LOSS,)

DUPLICATED_LINEAR = Rebinding(
    "megatron.core.transformer.multi_latent_attention",
    "TELinear",
    "MLA asks whether its down projections are this very class to build them duplicated over TP; no other class may be",
)
FINAL_NORM = Rebinding(
    "megatron.core.models.hybrid.hybrid_block",
    "TENorm",
    "the stack's final norm is not in its specification but this name",
)
BUILDING: tuple[Rebinding, ...] = (DUPLICATED_LINEAR, FINAL_NORM)


@dataclass(frozen=True)
class Override:
    """A method of a Megatron-core class, no public one, that a class of ours defines anew, and why."""

    module: str
    qualname: str
    reason: str


OVERRIDDEN: tuple[Override, ...] = tuple(
    Override(
        "megatron.core.tensor_parallel.layers",
        f"{name}._forward_impl",
        "the one place of a parallel linear that multiplies: emulated FP8 rounds the operands there",
    )
    for name in ("ColumnParallelLinear", "RowParallelLinear")
)


def rebind(entry: Rebinding, value: Any) -> Any:
    """Puts `value` in the entry's place and returns what stood there; AttributeError if Megatron-core lost the name."""
    module = importlib.import_module(entry.module)
    before = getattr(module, entry.name)
    setattr(module, entry.name, value)
    return before


@contextmanager
def rebound(values: dict[Rebinding, Any]) -> Iterator[None]:
    """Rebinds for the time of a with-block."""
    with ExitStack() as stack:
        for entry, value in values.items():
            stack.callback(rebind, entry, rebind(entry, value))
        yield
