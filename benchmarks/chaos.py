"""Runs that are killed at random moments and must end as if nothing had happened, to the last bit.

    python benchmarks/chaos.py [--kills 100] [--seed 1]

shares the kills out over layouts and optimizers (one process and EP 2, AdamW and Muon) and prints a table: where they
fell, and what differs from the undisturbed runs (losses, gradient norms and every tensor of the last checkpoint). Exits
with 1 if anything does. `tests/train/chaos.py` says what a run goes through.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' minuscule runs
from tests.train.chaos import KINDS, Case, endure
from tests.train.minuscule import EP2, EP2_MUON, ONE, ONE_MUON, make_staged_home

CASES = {"one process, AdamW": ONE, "one process, Muon": ONE_MUON, "EP 2, AdamW": EP2, "EP 2, Muon": EP2_MUON}
WHERE = {"in_flight": "checkpoint on its way", "in_ramp": "in the ramp", "at_stage_change": "at a stage change"}


def row(case: Case) -> str:
    """A line of the table."""
    kinds = Counter(hit["kind"] for hit in case.hits)
    places = [sum(hit[where] for hit in case.hits) for where in WHERE]
    verdict = "none" if not case.differences else f"{len(case.differences)}: {case.differences[0]}"
    cells = [case.name, case.runs, case.attempts, len(case.hits), *(kinds[kind] for kind in KINDS), *places, verdict]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Kills, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    head = ["case", "runs", "attempts", "signals", *KINDS, *WHERE.values(), "differences"]
    began, cases = time.monotonic(), list[Case]()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "home"
        make_staged_home(home)
        for number, (name, layout) in enumerate(CASES.items()):
            share = arguments.kills // len(CASES) + (number < arguments.kills % len(CASES))
            case = Case(name)
            cases.append(case)
            generator = random.Random(f"{arguments.seed} {name}")
            for fallen in endure(home, Path(scratch) / str(number), layout, case, share, generator):
                told = (
                    f"{name}: {fallen} of {share}, {case.compared} runs compared, {len(case.differences)} differences"
                )
                print(f"\r{told} ", end="", file=sys.stderr, flush=True)
            print(f"\n{row(case)}", file=sys.stderr, flush=True)
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for case in cases:
        print(row(case))
    print(f"\n{sum(len(case.hits) for case in cases)} signals in {time.monotonic() - began:.0f} s")
    if any(case.differences for case in cases):
        sys.exit(1)


if __name__ == "__main__":
    main()
