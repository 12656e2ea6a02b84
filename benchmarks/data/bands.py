"""The chance that two texts become candidates for near-duplicates, by their similarity, for three ways to cut.

    python benchmarks/data/bands.py [--figure docs/figures/dedup_bands.svg]

prints it at some similarities, by formula, and draws it.
"""

import argparse
import json
import sys
from pathlib import Path

from data_pipeline.dedup.bands import candidate_probability

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.figures import line_chart

CUTS = {"16 x 8 (ours)": (16, 8), "9 x 14": (9, 14), "8 x 16": (8, 16)}
TOLD = (0.8, 0.85, 0.9, 0.95)
DRAWN = [0.5 + step / 400 for step in range(201)]
THRESHOLD = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    for name, cut in CUTS.items():
        chances = {str(similarity): round(candidate_probability(similarity, *cut), 5) for similarity in TOLD}
        print(json.dumps({"cut": name, **chances}))
    if given.figure:
        lines = {name: [(x, candidate_probability(x, *cut)) for x in DRAWN] for name, cut in CUTS.items()}
        title = f"Chance to become a candidate; dashed: threshold {THRESHOLD}"
        chart = line_chart(title, "Jaccard similarity of 7-word shingles", "chance", lines, THRESHOLD)
        given.figure.write_text(chart, encoding="utf-8")


if __name__ == "__main__":
    main()
