"""Precision and recall of the detector of personal data on a labelled set, by kind; and what it finds in real text.

    python benchmarks/data/personal_data.py [--texts 3000] [--megabytes 10]

The set is built by benchmarks/shared/personal_data.py, which describes it. An entity counts as found when a finding of
its kind covers it whole, a finding as right when it overlaps an entity of its kind. In real text (the Python
environment's) nothing is labelled: findings are counted per megabyte.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import get_args

from data_pipeline.pii.block import Kind
from data_pipeline.pii.detect import find_all

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.corpus import environment_texts
from shared.personal_data import Labelled, labelled_texts

KINDS = frozenset(get_args(Kind))


def score(texts: list[Labelled]) -> dict[str, Counter[str]]:
    """By kind: entities, found of them, findings, right of them."""
    totals: dict[str, Counter[str]] = {}
    for one in texts:
        findings = find_all(one.text, KINDS)
        for kind, start, end in one.entities:
            count = totals.setdefault(kind, Counter())
            count["entities"] += 1
            count["found"] += any(f.kind == kind and f.start <= start and f.end >= end for f in findings)
        for finding in findings:
            count = totals.setdefault(finding.kind, Counter())
            count["findings"] += 1
            count["right"] += any(
                finding.kind == kind and finding.start < end and finding.end > start
                for kind, start, end in one.entities
            )
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=3000)
    parser.add_argument("--megabytes", type=float, default=10.0)
    options = parser.parse_args()
    totals = score(list(labelled_texts(options.texts, seed=1)))
    totals["all"] = sum(totals.values(), Counter())
    print("| kind | entities | found | recall | findings | right | precision |\n|---|---|---|---|---|---|---|")
    for kind, count in totals.items():
        recall, precision = count["found"] / count["entities"], count["right"] / max(1, count["findings"])
        row = (
            count["entities"],
            count["found"],
            f"{recall:.3f}",
            count["findings"],
            count["right"],
            f"{precision:.3f}",
        )
        print(f"| {kind} | {' | '.join(map(str, row))} |")
    texts = [text.decode() for text in environment_texts(options.megabytes)]
    began = time.process_time()
    found = Counter(finding.kind for text in texts for finding in find_all(text, KINDS))
    seconds = time.process_time() - began
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"\nreal text: {size:.1f} MB at {size / seconds:.1f} MB per CPU second; findings per MB:")
    print(", ".join(f"{kind} {count / size:.2f}" for kind, count in sorted(found.items())))


if __name__ == "__main__":
    main()
