"""What ranks of a proof report. Light, so that the parent of the ranks needs no torch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ParameterDifference:
    """The worst tensor of a rank: its largest difference, and that over the reference tensor's largest magnitude."""

    key: str
    absolute: float
    relative: float


@dataclass(frozen=True)
class Step:
    """Numbers of one step. `expert_tokens` [moe layers][experts]: tokens that each expert got."""

    number: int
    loss: float
    mtp_loss: float | None
    grad_norm: float
    expert_tokens: list[list[int]]


@dataclass(frozen=True)
class Routing:
    """A rank's routing decisions (a token in a layer), how many the reference's choice overruled, and by how much.

    `widest` is the largest difference of scores (between 0 and 1, with the bias) that the overruled ones had.
    """

    decisions: int
    overruled: int
    widest: float


@dataclass(frozen=True)
class Validation:
    """Losses of samples that were not trained on, after the last step."""

    loss: float
    mtp_loss: float | None


@dataclass(frozen=True)
class Run:
    """What a rank has to tell: steps (rank 0 only), their seconds and, in a layout, how it differs."""

    steps: list[Step]
    seconds: float
    validation: Validation
    worst: ParameterDifference | None = None
    routing: Routing | None = None


@dataclass(frozen=True)
class Papers:
    """Where the reference leaves what the layout needs."""

    checkpoints: Path
    weights: Path
    routing: Path
