"""The line charts of a report: what is in each (one table) and how each is drawn without JavaScript.

The page's script draws the same charts again from the embedded data, with zoom and tooltips; the static ones are what
a mail program, a printer or a reader with scripts off sees.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from megatron_joy.report import text

_STATIC_POINTS = 500
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 30


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart: the payload's series `key`, its legend, its colour class, and whether it has few points."""

    key: str
    label: str
    colour: str
    points: bool = False


@dataclass(frozen=True, slots=True)
class Reference:
    """A dashed horizontal line."""

    value: float
    label: str


@dataclass(frozen=True, slots=True)
class ChartSpec:
    """One chart.

    Attributes:
        unit: how numbers are written: loss, general, count or ratio.
        zero: the vertical axis begins at 0 (not on a log scale).
        log: the vertical axis is logarithmic at first; the reader may change it.
    """

    id: str
    title: str
    caption: str
    unit: str
    lines: Sequence[Line]
    references: Sequence[Reference] = ()
    zero: bool = False
    log: bool = False
    wide: bool = False


UNITS = {
    "loss": lambda v: f"{v:.3g}",
    "general": text.general,
    "count": text.count,
    "ratio": lambda v: f"{v:.3g}×",
}


def linear_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten apart) within [low, high]."""
    raw = (high - low) / max(1, wanted)
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within [low, high]; powers alone where the range is wide."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if len(decades) > 4 else (1, 2, 5)
    return [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most _STATIC_POINTS points, means of equal runs; NaN where a run has no number."""
    if len(x) <= _STATIC_POINTS:
        return x, y
    starts = np.linspace(0, len(x), _STATIC_POINTS, endpoint=False).astype(int)
    good = np.isfinite(y)
    total, number = np.add.reduceat(np.where(good, y, 0.0), starts), np.add.reduceat(good.astype(float), starts)
    with np.errstate(invalid="ignore"):
        return x[starts], total / number


def static_svg(
    spec: ChartSpec,
    data: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    x_range: tuple[float, float],
    *,
    width: int = 1120,
    height: int = 320,
) -> str:
    """The chart as inline SVG, coloured by the page's style sheet.

    Args:
        spec: the chart.
        data: for each of its lines (x [n], y [n]), NaN where there is no number.
        x_range: bounds of the horizontal axis, steps.
        width, height: of the view box; the picture scales with the page.
    """
    scale_y, ticks = _vertical_scale(spec, [y for _, y in data], height)
    span = max(x_range[1] - x_range[0], 1e-9)

    def place_x(x: float) -> float:
        return _LEFT + (x - x_range[0]) / span * (width - _LEFT - _RIGHT)

    unit = UNITS[spec.unit]
    parts = [f'<svg viewBox="0 0 {width} {height}" class="static" role="img" aria-label="{escape(spec.title)}">']
    for tick in ticks:
        y = scale_y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{y + 4:.1f}">{unit(tick)}</text>')
    for tick in linear_ticks(*x_range, int(min(8, span))):
        at = f'x="{place_x(tick):.1f}" y="{height - 8}"'
        parts.append(f'<text class="tick middle" {at}>{text.count(tick)}</text>')
    parts.append(f'<text class="axis-label end" x="{_LEFT - 24}" y="{height - 8}">step</text>')
    for line, (x, y_values) in zip(spec.lines, data, strict=True):
        parts.append(f'<path class="line {line.colour}" d="{_path(x, y_values, place_x, scale_y, spec.log)}"/>')
    for reference in spec.references:
        y = scale_y(reference.value)
        parts.append(f'<line class="reference" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="reference-label" x="{width - _RIGHT}" y="{y - 5:.1f}">{escape(reference.label)}</text>'
        )
    parts.append("</svg>")
    return "".join(parts)


def _vertical_scale(
    spec: ChartSpec, columns: list[NDArray[np.float64]], height: int
) -> tuple[Callable[[float], float], list[float]]:
    """Where a value is drawn, and the values that get a grid line."""
    values = np.concatenate([*columns, np.array([r.value for r in spec.references])])
    values = values[np.isfinite(values) & ((values > 0) | (not spec.log))]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.1, 1.0)
    if spec.log:
        low, high = (low / 1.1, high * 1.1) if low == high else (low, high)
        ticks = log_ticks(low, high)
        bottom, top = math.log(low), math.log(high)
    else:
        low = min(0.0, low) if spec.zero else low
        pad = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
        bottom, top = low - (0 if spec.zero else pad), high + pad
        ticks = linear_ticks(bottom, top, 5)

    def place(value: float) -> float:
        at = math.log(value) if spec.log else value
        return _TOP + (top - at) / (top - bottom) * (height - _TOP - _BOTTOM)

    return place, ticks


def _path(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    log: bool,
) -> str:
    pieces, pen = [], "M"
    for at, value in zip(*_thinned(x, y), strict=True):
        if not math.isfinite(value) or (log and value <= 0):
            pen = "M"
            continue
        pieces.append(f"{pen}{place_x(float(at)):.1f} {place_y(float(value)):.1f}")
        pen = "L"
    return "".join(pieces)
