"""The set of building blocks that a backend supplies and that `model.stack` puts together."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Blocks:
    """Module classes (or builders) that Megatron-core's layer specifications take."""

    name: str
    column_linear: Any  # splits output rows over TP
    row_linear: Any  # splits input columns over TP, reduces its output
    duplicated_linear: Any  # the same whole matrix on every TP rank (MLA's down projections)
    norm: Any
    core_attention: Any
    grouped_experts: Any  # all local routed experts as one module
