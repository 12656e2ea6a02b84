"""What ranks of a proof report. Light, so that the parent of the ranks needs no torch."""

from dataclasses import dataclass


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
class Run:
    """What a rank has to tell: steps (rank 0 only), its worst parameter against the reference, seconds of the steps."""

    steps: list[Step]
    worst: ParameterDifference | None
    seconds: float
