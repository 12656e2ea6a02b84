"""Which documents hold an evaluation item: n-gram overlap with a whitelist of common n-grams.

After JoyAI-LLM Flash's report, section 2.3.1: overlap of n-grams with the evaluation sets, and a whitelist so that
common n-grams do not delete documents. The report gives neither n nor the rule; ours:

- n is 13; shorter items, down to 8 words, are looked for as a whole.
- A document is unrelated to an item when it holds less than half of the item's n-grams. An n-gram is whitelisted for an
  item when more than `common` documents hold it that are unrelated to the item. Copies of an item, however many, thus
  never whitelist it; the wording that a thousand exams share is.
- A document goes when it holds at least `least` n-grams of one item that aren't whitelisted for it.

Two passes over what `EvaluationIndex.grams_in` finds: count, then judge. Counts of several workers add up.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.decontaminate.evaluation import EvaluationIndex
from data_pipeline.dedup.minhash import Numbers

COMMON = 10
LEAST = 1
RELATED = 0.5


@dataclass(frozen=True)
class Finding:
    """Why a document goes: the item that it shares most with, how many of its n-grams, how many of them whitelisted."""

    benchmark: str
    line: int
    grams: int
    hits: int
    whitelisted: int


def count_unrelated(index: EvaluationIndex, documents: Iterable[Numbers]) -> Numbers:
    """For each n-gram of each item (places in `index.owners`): how many documents unrelated to the item hold it.

    documents: what `index.grams_in` gives for each.
    """
    counts = np.zeros(len(index.owners), dtype=np.int64)
    for grams in documents:
        for item, places in index.hits(grams).items():
            if len(places) < RELATED * index.items[item].grams:
                counts[places] += 1
    return counts


def whitelist_of(counts: Numbers, common: int = COMMON) -> npt.NDArray[np.bool_]:
    """Which n-grams of items (places in `owners`) are common: in more than `common` unrelated documents."""
    listed: npt.NDArray[np.bool_] = counts > common
    return listed


def judge(
    index: EvaluationIndex, whitelist: npt.NDArray[np.bool_], grams: Numbers, least: int = LEAST
) -> Finding | None:
    """Why a document with these n-grams goes, None if it stays. Of several items the one with most hits."""
    best: Finding | None = None
    for number, own in sorted(index.hits(grams).items()):
        listed = int(np.count_nonzero(whitelist[own]))
        if len(own) - listed >= least and (best is None or len(own) > best.hits):
            item = index.items[number]
            best = Finding(item.benchmark, item.line, item.grams, len(own), listed)
    return best
