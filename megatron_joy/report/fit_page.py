"""A fitted law as one HTML page that loads nothing: its curve with the band, its constants, its runs."""

from html import escape

import numpy as np
from numpy.typing import NDArray

from megatron_joy.report.charts import linear_ticks, log_ticks
from megatron_joy.report.fit import BAND, Fit

WIDTH, HEIGHT = 900, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 46
BEYOND = 10.0  # the curve goes on to so many times the largest compute
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2rem auto;padding:0 1rem;color:#1c2126}"
    "svg{width:100%;height:auto}text{font-size:12px;fill:#5b6570}.grid{stroke:#e3e7eb}.band{fill:#0072b2;opacity:.15}"
    ".curve{fill:none;stroke:#0072b2;stroke-width:2}.seen{stroke:#b9c1c9;stroke-dasharray:4 4}.run{fill:#d55e00}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left}td+td{text-align:right}"
)

Numbers = NDArray[np.float64]


def _picture(fit: Fit) -> str:
    compute = np.array([point.compute for point in fit.points])
    x = np.geomspace(compute.min() / 1.5, compute.max() * BEYOND, 200)
    low, high = fit.band(x)
    curve = fit.law.at(x)
    losses = [point.loss for point in fit.points]
    bottom, top = min(low.min(), min(losses)), max(high.max(), max(losses))
    pad = 0.05 * (top - bottom) or 0.1
    bottom, top = bottom - pad, top + pad

    def across(value: float) -> float:
        return LEFT + float(np.log(value / x[0]) / np.log(x[-1] / x[0])) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return TOP + (top - float(value)) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    def path(xs: Numbers, ys: Numbers) -> str:
        return "L".join(f"{across(a):.1f} {up(b):.1f}" for a, b in zip(xs, ys, strict=True))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Loss against compute">']
    for tick in linear_ticks(bottom, top, 6):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in log_ticks(float(x[0]), float(x[-1])):
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - 24}" text-anchor="middle">{tick:.0e}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">FLOPs of the model</text>')
    parts.append(f'<path class="band" d="M{path(x, low)}L{path(x[::-1], high[::-1])}Z"/>')
    edge = across(compute.max())
    parts.append(f'<line class="seen" x1="{edge:.1f}" x2="{edge:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<path class="curve" d="M{path(x, curve)}"/>')
    for point in fit.points:
        title = f"<title>{escape(point.name)}: {point.compute:.3g} FLOPs, loss {point.loss:.4f}</title>"
        place = f'cx="{across(point.compute):.1f}" cy="{up(point.loss):.1f}"'
        parts.append(f'<circle class="run" {place} r="4">{title}</circle>')
    return "".join([*parts, "</svg>"])


def fit_page(fit: Fit) -> str:
    """The whole page."""
    law = fit.law
    constants = "".join(
        f"<tr><td>{label}</td><td>{getattr(law, name):.4g}</td><td>{low:.4g} to {high:.4g}</td></tr>"
        for label, name in (("E", "floor"), ("A", "scale"), ("alpha", "alpha"))
        for low, high in [fit.interval(name)]
    )
    runs = "".join(
        f"<tr><td>{escape(point.name)}</td><td>{point.compute:.4g}</td><td>{point.loss:.4f}</td>"
        f"<td>{float(law.at(np.array([point.compute]))[0]):.4f}</td></tr>"
        for point in sorted(fit.points, key=lambda point: point.compute)
    )
    far = np.array([max(point.compute for point in fit.points) * BEYOND])
    low, high = (float(side[0]) for side in fit.band(far))
    width = f"{BAND[1] - BAND[0]:.0f} %"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Loss against compute</title>'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{STYLE}</style></head><body><h1>Loss against compute</h1>{_picture(fit)}"
        f"<p>L = E + A / C<sup>alpha</sup> by least squares over {len(fit.points)} runs' {fit.kind} losses; the band "
        f"has {width} of {len(fit.resampled):,} fits to resampled residuals. It says how well the runs fix this form, "
        "not that the form holds beyond them (right of the dashed line). At "
        f"{BEYOND:g} times the largest compute it gives {float(law.at(far)[0]):.4f} ({low:.4f} to {high:.4f}).</p>"
        f"<h2>Constants</h2><table><tr><th></th><th>best</th><th>{width}</th></tr>{constants}</table>"
        "<h2>Runs</h2><table><tr><th>run</th><th>FLOPs</th><th>loss</th><th>law</th></tr>"
        f"{runs}</table></body></html>"
    )
