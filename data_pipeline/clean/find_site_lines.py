"""Find each site's boilerplate: `python -m data_pipeline.clean.find_site_lines PIPELINE.toml --out FOLDER`.

The pipeline's sources are read through the transforms that stand before kind = "site_lines"; a line is boilerplate of
a site when it is on at least `--pages` of its pages and on at least `--share` of them. Memory: a number for each site,
and the rows of a sorter (dedup/external.py), however large the corpus is. Copies of a page count as pages.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import orjson
import xxhash

from data_pipeline.clean.site_lines import DESCRIPTION, HASHES, hashes_of, site_of
from data_pipeline.config import Pipeline, load_pipeline
from data_pipeline.dedup.external import RowSorter, group_starts, rows_of
from data_pipeline.inventory import take_inventory
from data_pipeline.readers.base import Document
from data_pipeline.readers.open import read_piece
from data_pipeline.transform.base import Draft, TransformSection
from data_pipeline.transform.chain import Chain, sections_for
from megatron_joy.data.atomic import atomic_file, write_atomically
from megatron_joy.errors import UserError, exit_code

BATCH = 100_000  # rows that are handed to the sorter at a time


def transforms_before(pipeline: Pipeline) -> list[TransformSection]:
    """The transforms in front of the first site_lines. Raises UserError when there is none."""
    kinds = [section.kind for section in pipeline.transforms]
    if "site_lines" not in kinds:
        raise UserError(
            f'pipeline {pipeline.name}: no transform kind = "site_lines"; add one where boilerplate is to go, with '
            "lines = the folder given by --out"
        )
    return list(pipeline.transforms[: kinds.index("site_lines")])


def pages_of(pipeline: Pipeline, before: list[TransformSection]) -> Iterator[tuple[str, list[str]]]:
    """(site, lines) of every document with a URL that the transforms `before` keep."""
    chains = [Chain(sections_for(before, source.name)) for source in pipeline.sources]
    inventory = take_inventory(pipeline)
    for piece in (piece for task in inventory.tasks for piece in task):
        file = inventory.inputs[piece.input]
        for record in read_piece(pipeline, file, piece):
            site = site_of(record.url) if isinstance(record, Document) else None
            if site is None or not isinstance(record, Document):
                continue
            draft = Draft(record.text.decode(), record.url, file.path)
            if chains[file.source].apply(draft) is None:
                yield site, draft.text.split("\n")


def find_lines(pages: Iterator[tuple[str, list[str]]], least: int, share: float, out: Path) -> dict[str, int]:
    """Write the folder `out`; returns how many pages, sites and lines there were. `least`, `share`: see above."""
    sorter = RowSorter(out / "scratch")
    totals: Counter[int] = Counter()
    rows: list[tuple[int, int]] = []

    def hand_over() -> None:
        if rows:
            keys, sites = np.array(rows, dtype=np.uint64).T
            sorter.add(rows_of(keys, sites))
            rows.clear()

    for site, lines in pages:
        number = xxhash.xxh3_64_intdigest(site.encode("utf-8", "replace"))
        totals[number] += 1
        rows += [(found, number) for found in hashes_of(site, lines)]
        if len(rows) >= BATCH:
            hand_over()
    hand_over()
    chosen = [np.zeros(0, dtype=np.uint64)]
    for block in sorter.blocks():
        starts = group_starts(block[:, 0])
        counts, first = np.diff(starts), starts[:-1]
        sizes = np.array([totals[int(site)] for site in block[first, 1]], dtype=np.int64)
        chosen.append(block[first[(counts >= least) & (counts >= share * sizes)], 0])
    hashes = np.sort(np.concatenate(chosen))
    with atomic_file(out / HASHES) as stream:
        np.save(stream, hashes, allow_pickle=False)
    found = {"pages": totals.total(), "sites": len(totals), "lines": len(hashes)}
    write_atomically(out / DESCRIPTION, orjson.dumps({**found, "least": least, "share": share}))
    return found


def run(arguments: Sequence[str]) -> int:
    """The command; returns its exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.clean.find_site_lines", description=__doc__)
    parser.add_argument("pipeline", help="a pipeline's TOML or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=5, help="pages of a site that a line must be on")
    parser.add_argument("--share", type=float, default=0.2, help="share of its pages that it must be on")
    options = parser.parse_intermixed_args(arguments)
    if options.pages < 2 or not 0 < options.share <= 1:
        raise UserError(f"--pages {options.pages} --share {options.share}: expects 2 or more, and above 0 up to 1")
    pipeline = load_pipeline(options.pipeline, options.overrides)
    pages = pages_of(pipeline, transforms_before(pipeline))
    print(orjson.dumps(find_lines(pages, options.pages, options.share, options.out)).decode())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(run, sys.argv[1:]))
