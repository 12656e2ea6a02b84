"""Line charts as SVG text, for the figures in docs/: nothing but lines, axes and a legend, the same bytes each time."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 60, 190, 40, 45
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, told apart by all eyes

Points = Sequence[tuple[float, float]]


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers inside [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def line_chart(
    title: str, x_label: str, y_label: str, lines: Mapping[str, Points], threshold: float | None = None
) -> str:
    """An SVG document with one line per entry, in its order, and a dashed one upright at `threshold`."""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - x0) / (x1 - x0) * width, TOP + (1 - (y - y0) / (y1 - y0)) * height

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
        f'<text x="{LEFT + width / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="14" y="{TOP + height / 2}" text-anchor="middle" transform="rotate(-90 14 {TOP + height / 2})">'
        f"{escape(y_label)}</text>",
    ]
    for tick in _ticks(x0, x1):
        x, y = at(tick, y0)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{tick:g}</text>')
    for tick in _ticks(y0, y1):
        x, y = at(x0, tick)
        parts.append(f'<path d="M{x:.1f} {y:.1f}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*point) for point in points))
        row = TOP + 12 + 20 * number
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts.append(f'<path d="M{LEFT + width + 12} {row - 4}h18" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{LEFT + width + 36}" y="{row}">{escape(name)}</text>')
    if threshold is not None:
        parts.append(f'<path d="M{at(threshold, y0)[0]:.1f} {TOP}v{height}" stroke="black" stroke-dasharray="4 3"/>')
    return "\n".join([*parts, "</svg>", ""])


def smoothed(points: Points, window: int) -> list[tuple[float, float]]:
    """Means over the last `window` values."""
    ys = [y for _, y in points]
    return [(x, sum(ys[max(0, i - window + 1) : i + 1]) / min(i + 1, window)) for i, (x, _) in enumerate(points)]
