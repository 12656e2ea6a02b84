"""Bars as inline SVG, coloured by the page's style sheet: a funnel of steps, and histograms."""

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from megatron_joy.report import text
from megatron_joy.report.charts import linear_ticks

_ROW, _NAME, _FIGURES = 30, 170, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 24, 14, 30


def funnel(rows: Sequence[tuple[str, int, int, str]], width: int = 1120) -> str:
    """One bar a step.

    Args:
        rows: (name, kept, lost, figures): how many the step let through, how many it did not, and what stands beside.
        width: of the view box.
    """
    most = max((kept + lost for _, kept, lost, _ in rows), default=0) or 1
    room = width - _NAME - _FIGURES
    parts = [f'<svg viewBox="0 0 {width} {_ROW * len(rows) + 4}" class="static" role="img" aria-label="funnel">']
    for number, (name, kept, lost, figures) in enumerate(rows):
        top = number * _ROW + 4
        kept_width, lost_width = room * kept / most, room * lost / most
        parts.append(f'<text class="tick end" x="{_NAME - 10}" y="{top + 16}">{escape(name)}</text>')
        parts.append(f'<rect class="bar" x="{_NAME}" y="{top}" width="{kept_width:.1f}" height="{_ROW - 8}"/>')
        if lost:
            at = f'x="{_NAME + kept_width:.1f}" y="{top}"'
            parts.append(f'<rect class="bar lost" {at} width="{max(lost_width, 1.5):.1f}" height="{_ROW - 8}"/>')
        place = _NAME + kept_width + lost_width + 10
        parts.append(f'<text class="tick" x="{place:.1f}" y="{top + 16}">{escape(figures)}</text>')
    return "".join([*parts, "</svg>"])


def histogram(
    counts: Sequence[int],
    labels: Sequence[tuple[float, str]],
    title: str,
    marks: Sequence[tuple[float, str]] = (),
    width: int = 540,
    height: int = 200,
) -> str:
    """Upright bars of the same width side by side.

    Args:
        counts: height of each bar.
        labels: (place, text) along the axis; the first bar begins at 0 and each is 1 wide.
        title: for those who can't see it.
        marks: (place, text) of dashed upright lines.
        width, height: of the view box.
    """
    most = max([*counts, 1])
    across, down = (width - _LEFT - _RIGHT) / max(1, len(counts)), height - _TOP - _BOTTOM
    parts = [f'<svg viewBox="0 0 {width} {height}" class="static" role="img" aria-label="{escape(title)}">']
    for tick in linear_ticks(0, most, 4):
        y = _TOP + down * (1 - tick / most)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{y + 4:.1f}">{text.count(tick)}</text>')
    for number, count in enumerate(counts):
        size = down * count / most
        place = f'x="{_LEFT + number * across:.1f}" y="{_TOP + down - size:.1f}"'
        drawn = f'width="{max(0.5, across - 1.5):.1f}" height="{size:.1f}"'
        parts.append(f'<rect class="bar" {place} {drawn}><title>{count:,}</title></rect>')
    for at, label in labels:
        x = _LEFT + at * across
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{height - 8}">{escape(label)}</text>')
    for at, label in marks:
        x = _LEFT + at * across
        parts.append(f'<line class="reference" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + down}"/>')
        parts.append(f'<text class="reference-label" x="{x + 4:.1f}" y="{_TOP + 4}">{escape(label)}</text>')
    return "".join([*parts, "</svg>"])


def binned(values: NDArray[np.float64], counts: NDArray[np.int64], bins: int = 30) -> tuple[list[int], float, float]:
    """Counts in equal bins, and where the first begins and the last ends.

    The outermost half per cent on either side is drawn in the first and the last bin: one wild value would otherwise
    leave all others in a single bar.

    Args:
        values, counts: different values, ascending, and how often each occurs.
    """
    share = np.cumsum(counts) / counts.sum()
    low = float(values[np.searchsorted(share, 0.005)])
    high = float(values[min(len(values) - 1, int(np.searchsorted(share, 0.995)))])
    if low == high:
        low, high = low - 0.5, high + 0.5
    places = np.clip(((values - low) / (high - low) * bins).astype(np.int64), 0, bins - 1)
    return np.bincount(places, weights=counts, minlength=bins).astype(int).tolist(), low, high
