"""Loss against compute over several runs: L = E + A / C^alpha, with confidence from a residual bootstrap.

Source of the form: Hoffmann et al. (arXiv 2203.15556), in one variable. C are FLOPs of the model over the whole run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_joy.errors import UserError
from megatron_joy.report import text
from megatron_joy.report.metrics import Metrics, read_metrics
from megatron_joy.report.runlog import require_run
from megatron_joy.report.summary import last_value

Numbers = NDArray[np.float64]
FEWEST = 4  # runs: three constants, and something to judge them by
LAST_SHARE = 0.05  # of a run's rows that its training loss is the mean of
ALPHAS = np.geomspace(0.01, 2.0, 300)
SAMPLES = 1000
BAND = (5.0, 95.0)  # percentiles


@dataclass(frozen=True)
class Point:
    """A run: FLOPs of its model over all counted steps, and the loss it came to."""

    name: str
    compute: float
    loss: float


@dataclass(frozen=True)
class Law:
    """L(C) = floor + scale / C^alpha."""

    floor: float
    scale: float
    alpha: float

    def at(self, compute: Numbers) -> Numbers:
        """Losses at so many FLOPs."""
        return self.floor + self.scale * compute**-self.alpha


@dataclass(frozen=True)
class Fit:
    """The best law, and laws fitted to resampled residuals; `kind` says which loss the points have."""

    points: tuple[Point, ...]
    law: Law
    resampled: tuple[Law, ...]
    kind: str

    def band(self, compute: Numbers) -> tuple[Numbers, Numbers]:
        """The resampled laws' BAND percentiles at so many FLOPs."""
        low, high = np.percentile(np.stack([law.at(compute) for law in self.resampled]), BAND, axis=0)
        return low, high

    def interval(self, constant: str) -> tuple[float, float]:
        """The BAND percentiles of floor, scale or alpha."""
        low, high = np.percentile([getattr(law, constant) for law in self.resampled], BAND)
        return float(low), float(high)


def _compute(metrics: Metrics, folder: Path) -> float:
    """FLOPs of all rows that count."""
    tokens = np.diff(metrics["tokens"], prepend=0.0)
    total = float((tokens * metrics["model_flops_per_token"]).sum())
    if not len(metrics) or not np.isfinite(total):
        raise UserError(f"{folder}: its metrics.jsonl does not say the model's FLOPs of every step; leave the run out")
    return total


def read_points(folders: Sequence[Path]) -> tuple[list[Point], str]:
    """A point for each run, and the kind of loss: of the last validation where all runs have one, else of training.

    Raises UserError for a folder that is no run's, or whose metrics lack FLOPs or a loss.
    """
    runs = [(folder, read_metrics(require_run(folder) / "metrics.jsonl")) for folder in folders]
    validated = [last_value(metrics, "validation_loss") for _, metrics in runs]
    if all(validated):
        losses, kind = [found[0] for found in validated if found], "validation"
    else:
        losses, kind = [_training_loss(metrics) for _, metrics in runs], "training"
    points = []
    for (folder, metrics), loss in zip(runs, losses, strict=True):
        compute = _compute(metrics, folder)
        if not np.isfinite(loss):
            raise UserError(f"{folder}: its last {kind} loss is no number; leave the run out")
        points.append(Point(folder.name, compute, loss))
    return points, kind


def _training_loss(metrics: Metrics) -> float:
    rows = max(1, round(LAST_SHARE * len(metrics)))
    return float(np.mean(metrics["loss"][-rows:])) if len(metrics) else float("nan")


def _solve(x: Numbers, losses: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Least squares of losses [m, n] on 1 and x [n], neither constant negative: floors, scales, squared errors [m]."""
    centred = x - x.mean()
    scales = losses @ centred / (centred @ centred)
    floors = losses.mean(1) - scales * x.mean()
    bare = losses @ x / (x @ x)  # without a floor
    scales, floors = np.where(floors < 0, bare, scales), np.maximum(floors, 0.0)
    flat = scales < 0
    scales, floors = np.where(flat, 0.0, scales), np.where(flat, losses.mean(1), floors)
    errors = ((losses - floors[:, None] - scales[:, None] * x) ** 2).sum(1)
    return floors, scales, errors


def _laws(compute: Numbers, losses: Numbers, alphas: Numbers) -> list[Law]:
    """The best law for each row of losses [m, n] over a grid of exponents."""
    unit = np.exp(np.log(compute).mean())  # so that powers stay near one
    best = np.full(len(losses), np.inf)
    found = np.zeros((len(losses), 3))
    for alpha in alphas:
        floors, scales, errors = _solve((compute / unit) ** -alpha, losses)
        better = errors < best
        best[better] = errors[better]
        found[better] = np.stack([floors, scales * unit**alpha, np.full_like(floors, alpha)], 1)[better]
    return [Law(*map(float, row)) for row in found]


def fit_law(points: Sequence[Point], kind: str, seed: int = 0, samples: int = SAMPLES) -> Fit:
    """The least-squares law of at least FEWEST points with different compute, and so many resampled ones.

    Residuals are drawn with replacement after scaling by sqrt(n / (n - 3)), since three constants follow them.
    """
    compute = np.array([point.compute for point in points])
    losses = np.array([point.loss for point in points])
    if (different := len(set(compute.tolist()))) < FEWEST:
        raise UserError(
            f"--fit: {text.plural(different, 'run')} of different compute; the law has three constants and needs at "
            f"least {FEWEST} (joy recipe sweep writes a ladder of them)"
        )
    (rough,) = _laws(compute, losses[None], ALPHAS)
    (law,) = _laws(compute, losses[None], np.linspace(rough.alpha * 0.98, rough.alpha * 1.02, 401))
    curve, count = law.at(compute), len(points)
    residuals = (losses - curve) * np.sqrt(count / (count - 3))
    drawn = np.random.default_rng(seed).integers(0, count, (samples, count))
    return Fit(tuple(points), law, tuple(_laws(compute, curve + residuals[drawn], ALPHAS)), kind)
