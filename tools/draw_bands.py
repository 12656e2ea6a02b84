"""Draw docs/dedup_bands.svg: the chance that two texts become candidates, by their similarity, for three ways to cut.

python tools/draw_bands.py
"""

from pathlib import Path

from data_pipeline.dedup.bands import candidate_probability

TARGET = Path(__file__).parents[1] / "docs" / "dedup_bands.svg"
CURVES = (((16, 8), "#1b6ca8", "16 x 8 (ours)"), ((9, 14), "#b07d2b", "9 x 14"), ((8, 16), "#a23b4f", "8 x 16"))
LEFT, TOP, WIDTH, HEIGHT = 56, 20, 520, 300
FIRST, LAST = 0.5, 1.0


def x_of(similarity: float) -> float:
    """Pixels from the left."""
    return LEFT + WIDTH * (similarity - FIRST) / (LAST - FIRST)


def y_of(chance: float) -> float:
    """Pixels from the top."""
    return TOP + HEIGHT * (1 - chance)


def figure() -> str:
    """The whole picture."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {TOP + HEIGHT + 50}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for tenth in range(5, 11):
        x, y = x_of(tenth / 10), y_of((tenth - 5) / 5)
        parts.append(f'<path d="M{x:.1f} {TOP}V{TOP + HEIGHT}M{LEFT} {y:.1f}H{LEFT + WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{tenth / 10:.1f}</text>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{(tenth - 5) / 5:.1f}</text>')
    for number, ((bands, rows), colour, label) in enumerate(CURVES):
        points = [FIRST + (LAST - FIRST) * step / 200 for step in range(201)]
        line = " ".join(f"{x_of(s):.1f},{y_of(candidate_probability(s, bands, rows)):.1f}" for s in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + 14}" y="{TOP + 24 + 18 * number}" fill="{colour}">{label}</text>')
    parts.append(f'<path d="M{x_of(0.9):.1f} {TOP}V{TOP + HEIGHT}" stroke="black" stroke-dasharray="4 3"/>')
    middle = LEFT + WIDTH / 2
    parts.append(
        f'<text x="{middle}" y="{TOP + HEIGHT + 40}" text-anchor="middle">Jaccard similarity of 7-word shingles; '
        "dashed: threshold 0.9</text></svg>"
    )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(figure(), encoding="utf-8")
