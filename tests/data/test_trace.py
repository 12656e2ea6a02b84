"""A step leads back to the documents it was trained on, to the byte, from the recipe and the manifests alone."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_joy.data.batch import BatchLoader
from megatron_joy.data.steps import BatchShape
from megatron_joy.data.stream import SampleStream
from megatron_joy.data.trace import render_trace, trace
from megatron_joy.errors import UserError
from megatron_joy.recipe import dump_recipe
from megatron_joy.recipe.derive import derive
from megatron_joy.recipe.schema import Recipe

from .tiny_shards import dealt, encode, recipe_table, some_texts, write_shard_set


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Recipe]:
    """A run's folder with nothing but its recipe: two ranks, two sources."""
    for name, shards in (("a", 5), ("b", 3)):
        write_shard_set(tmp_path / name, some_texts(shards, 20, seed=shards), source=name)
    table = recipe_table([{"manifest": str(tmp_path / "a"), "weight": 3.0}, {"manifest": str(tmp_path / "b")}])
    table["layout"] = {"data_parallel_size": 2}
    recipe = derive(Recipe.model_validate(table))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(dump_recipe(recipe))
    return tmp_path / "run", recipe


def test_the_text_that_a_step_leads_to_is_the_text_that_it_was_trained_on(run: tuple[Path, Recipe]) -> None:
    folder, recipe = run
    stream = SampleStream(recipe.data, recipe.seed, "train")
    for step in (1, 10):
        for rank in range(2):
            rows = trace(folder, step, rank)
            with BatchLoader(stream, dealt(BatchShape(8, 2, 2), rank), True, step - 1, step) as loader:
                batches = next(loader)
            read: dict[tuple[int, int], list[int]] = {}
            for row in rows:
                origin = row["origin"]
                corpus = (folder.parent / origin["source"] / origin["file"]).read_bytes()
                text = corpus[origin["offset"] :][: origin["bytes_text"]].decode()
                piece = encode(text)[slice(*row["document_tokens"])]
                read.setdefault((row["micro_batch"], row["row"]), []).extend(piece.tolist())
                assert row["rank"] == rank and row["step"] == step and row["source"] == origin["source"]
            assert len(read) == 4
            for (m, row_number), tokens in read.items():
                assert tokens[:-1] == batches[m].tokens[row_number].tolist()
                assert tokens[1:] == batches[m].labels[row_number].tolist()


def test_all_ranks_together_hold_each_sample_of_the_step_once(run: tuple[Path, Recipe]) -> None:
    rows = trace(run[0], 3)
    assert [row for row in rows if row["rank"] == 1] == trace(run[0], 3, 1)
    assert {row["sample"] for row in rows} == set(range(16, 24))
    places = {row["sample"]: (row["rank"], row["micro_batch"], row["row"]) for row in rows}
    assert len(set(places.values())) == 8


def test_rows_are_json_and_make_a_table(run: tuple[Path, Recipe]) -> None:
    rows = trace(run[0], 2)
    assert json.loads(json.dumps(rows)) == rows
    output = io.StringIO()
    rows[0]["origin"]["file"] = "odd [red]name[/red].txt"
    Console(file=output, width=200).print(render_trace(rows))
    assert "documents of step 2" in output.getvalue() and "odd [red]name[/red].txt" in output.getvalue()
    Console(file=output, width=200).print(render_trace([]))


def test_shards_without_provenance_are_traced_to_the_document_number(run: tuple[Path, Recipe]) -> None:
    folder = run[0]
    for name in ("a", "b"):
        path = folder.parent / name / "manifest.json"
        manifest: dict[str, Any] = json.loads(path.read_text())
        for shard in manifest["shards"]:
            shard["provenance"] = shard["provenance_blake3"] = None
        path.write_text(json.dumps(manifest))
    rows = trace(folder, 1, 0)
    assert all(row["origin"] is None and row["document"] >= 0 for row in rows)
    Console(file=io.StringIO()).print(render_trace(rows))


@pytest.mark.parametrize(
    ("step", "rank", "says"),
    [
        (0, None, r"--step 0: the run has steps 1 to 10"),
        (11, None, r"--step 11: the run has steps 1 to 10"),
        (1, 2, r"--rank 2: the run has data-parallel ranks 0 to 1"),
        (1, -1, r"--rank -1"),
    ],
)
def test_a_step_or_rank_outside_the_run_is_refused(
    run: tuple[Path, Recipe], step: int, rank: int | None, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        trace(run[0], step, rank)


def test_a_folder_that_is_no_run_and_lost_provenance_are_refused(run: tuple[Path, Recipe], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recipe\.toml, so not a run's folder"):
        trace(tmp_path, 1)
    for path in tmp_path.glob("*/*.documents.*"):
        path.unlink()
    with pytest.raises(UserError, match="it says where the shard's documents are from"):
        trace(run[0], 1)


def test_torn_provenance_is_refused(run: tuple[Path, Recipe], tmp_path: Path) -> None:
    for path in tmp_path.glob("*/*.documents.*"):
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="documents"):
        trace(run[0], 1)
