"""From a step back to the documents it was trained on: the arithmetic of the sample order, run once more.

Nothing is logged during training for this. A run's recipe, its ledger and its manifests are enough, for any step, also
one that was never run. Where a guard went back and left samples out, a step's documents are those of its second time.
Steps count from 1 here, as in metrics.jsonl.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from megatron_joy.data.source import DocumentPiece
from megatron_joy.data.steps import planned_indices
from megatron_joy.data.stream import SampleStream
from megatron_joy.errors import UserError
from megatron_joy.recipe import Recipe, load_recipe
from megatron_joy.recipe.ledger import begin, read_ledger
from megatron_joy.recipe.timetable import Timetable


def trace(run_folder: Path | str, step: int, rank: int | None = None) -> list[dict[str, Any]]:
    """The documents of each sample that step `step` (from 1, as in metrics.jsonl) of a run is made of.

    rank: a data-parallel rank, None for all. One row for each part of a document in a sample, all of it JSON:
        step; rank (data-parallel), micro_batch, row (in the micro-batch), by the layout of the newest attempt;
        sample (of the run); source; epoch; index (sample of the source at this length); token_offset (of the sample in
        the source); sequence_length;
        shard; document (number in the shard); tokens [first, last) in the sample; document_tokens [first, last) in the
        document; origin (file, offset, licence, ... as `DocumentOrigin`; None where the shard has none).
    A sample has sequence_length + 1 tokens; the last one is only a label.

    Raises UserError when the folder is no run, the step or rank is outside it, or a shard or manifest is not there.
    """
    recipe = _recipe_of(Path(run_folder))
    ranks = recipe.layout.data_parallel_size
    if not 1 <= step <= recipe.train.steps:
        raise UserError(f"--step {step}: the run has steps 1 to {recipe.train.steps} (train.steps); name one of them")
    if rank is not None and not 0 <= rank < ranks:
        raise UserError(f"--rank {rank}: the run has data-parallel ranks 0 to {ranks - 1}; name one of them")
    timetable = Timetable(recipe)
    ledger = read_ledger(Path(run_folder)) or begin(recipe)
    stream = SampleStream(recipe.data, recipe.seed, "train", ledger)
    try:
        return [
            {"step": step, "rank": data_rank, "micro_batch": m, "row": row, **part}
            for data_rank in (range(ranks) if rank is None else [rank])
            for m, samples in enumerate(planned_indices(step - 1, timetable, ledger, ranks, data_rank))
            for row, k in enumerate(samples)
            for part in trace_sample(stream, k)
        ]
    finally:
        stream.close()


def trace_sample(stream: SampleStream, k: int) -> list[dict[str, Any]]:
    """The rows of one sample, without where in a step it is read."""
    place = stream.place(k)
    return [{"sample": k, **asdict(place), **_part(piece)} for piece in stream.documents(k)]


def _part(piece: DocumentPiece) -> dict[str, Any]:
    return {
        "shard": piece.shard,
        "document": piece.document,
        "tokens": list(piece.tokens),
        "document_tokens": list(piece.document_tokens),
        "origin": None if piece.origin is None else asdict(piece.origin),
    }


def _recipe_of(run_folder: Path) -> Recipe:
    path = run_folder / "recipe.toml"
    if not path.is_file():
        raise UserError(f"{run_folder}: no recipe.toml, so not a run's folder; name one, as runs/joyai_tiny")
    return load_recipe(str(path))


def render_trace(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a table for a terminal of 80 columns or more; a sample's number stands beside its first document."""
    title = f"documents of step {rows[0]['step']}" if rows else "no documents"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("rank", "sample"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("tokens", "document", "its tokens"):
        table.add_column(name, no_wrap=True)
    table.add_column("from", overflow="fold", min_width=24, ratio=1)
    table.add_column("licence", overflow="ellipsis", no_wrap=True, max_width=10)
    shown: int | None = None
    for row in rows:
        origin = row["origin"] or {"file": "not recorded", "offset": 0, "licence": None}
        place = f" @ {origin['offset']}" if origin["offset"] else ""
        again = f" (epoch {row['epoch']})" if row["epoch"] else ""
        cells = [
            *([str(row["rank"]), str(row["sample"])] if row["sample"] != shown else [""] * 2),
            "{}-{}".format(*row["tokens"]),
            f"{row['shard'].removeprefix('shard_')}:{row['document']}",
            "{}-{}".format(*row["document_tokens"]),
            f"{row['source']}: {origin['file']}{place}{again}",
            origin["licence"] or "",
        ]
        table.add_row(*map(Text, cells))  # as it stands: a file's name may look like markup
        shown = row["sample"]
    return table
