"""Across stages, ramps and edited blends no token of a source is read twice before all are, and none is left out.

The check is by brute force on what `trace` says: a counter for each token of each source.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_joy.data.stream import SampleStream
from megatron_joy.data.trace import trace
from megatron_joy.errors import UserError
from megatron_joy.recipe import dump_recipe, load_recipe
from megatron_joy.recipe.ledger import LEDGER_FILE, Ledger, as_json, begin, first_sample, go_on, with_rollback
from megatron_joy.recipe.schema import Recipe
from megatron_joy.recipe.timetable import Timetable
from tests.data.tiny_shards import recipe_table, some_texts, write_shard_set

# Three lengths, two of them in turns; a ramp; four blends. Every source is read for more than two epochs.
STAGES: list[dict[str, Any]] = [
    {
        "name": "a",
        "steps": 60,
        "ramp_from": 2,
        "ramp_increment": 2,
        "start_lr": 1e-3,
        "blend": [("x", 3.0), ("y", 1.0)],
    },
    {"name": "b", "steps": 40, "sequence_length": 24, "blend": [("y", 1.0), ("z", 2.0)]},
    {"name": "c", "steps": 40, "blend": [("x", 1.0), ("y", 1.0), ("z", 1.0)]},
    {"name": "d", "steps": 50, "sequence_length": 16, "global_batch_size": 4, "blend": [("z", 1.0), ("y", 2.0)]},
]
EDITED = {1: [("y", 2.0), ("z", 1.0)], 2: [("x", 5.0), ("z", 1.0)], 3: [("y", 1.0), ("z", 3.0)]}


def make(folder: Path, blends: dict[int, list[tuple[str, float]]] | None = None, ranks: int = 1) -> Recipe:
    entries = [{"name": name, "manifest": str(folder / name)} for name in "xyz"]
    table = recipe_table(entries, 8, steps=190, global_batch_size=8, micro_batch_size=1)
    table["layout"] = {"data_parallel_size": ranks}
    stages = []
    for number, stage in enumerate(STAGES):
        blend = (blends or {}).get(number, stage["blend"])
        stages.append(stage | {"blend": [{"source": name, "weight": weight} for name, weight in blend]})
    path = folder / "recipe.toml"
    path.write_text(dump_recipe(Recipe.model_validate(table | {"stages": stages})))
    return load_recipe(str(path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate("xyz"):
        write_shard_set(tmp_path / name, some_texts(2, 12 + 5 * seed, seed=seed), name)
    return tmp_path


def run_folder(folder: Path, recipe: Recipe, ledger: Ledger) -> Path:
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "recipe.toml").write_text(dump_recipe(recipe))
    (run / LEDGER_FILE).write_text(json.dumps(as_json(ledger)))
    return run


def read_counts(run: Path, steps: int) -> tuple[dict[str, Any], dict[str, set[int]]]:
    """How often each token of each source was an input, in the order of the run, and the lengths it was read at."""
    read: dict[str, Counter[int]] = {name: Counter() for name in "xyz"}
    lengths: dict[str, dict[int, int]] = {name: {} for name in "xyz"}
    for step in range(1, steps + 1):
        for row in {row["sample"]: row for row in trace(run, step)}.values():
            for token in range(row["token_offset"], row["token_offset"] + row["sequence_length"]):
                read[row["source"]][token] += 1
                assert lengths[row["source"]].setdefault(token, row["sequence_length"]) == row["sequence_length"]
    return read, {name: set(of.values()) for name, of in lengths.items()}


@pytest.mark.parametrize("edits", [[], [37], [20, 75, 120]], ids=["as planned", "one edit", "three edits"])
def test_no_token_is_read_twice_before_all_of_its_share_are(folder: Path, edits: list[int]) -> None:
    recipe = make(folder)
    ledger = begin(recipe)
    for number, step in enumerate(edits):
        recipe = make(folder, EDITED if number % 2 == 0 else None)
        ledger = go_on(ledger, recipe, step)
    assert len(ledger) == 1 + len(edits)
    read, lengths = read_counts(run_folder(folder, recipe, ledger), 190)
    assert lengths == {"x": {8}, "y": {8, 16, 24}, "z": {8, 16, 24}}
    stream = SampleStream(recipe.data, recipe.seed, "train", ledger)
    for name, source in stream.sources.items():
        block = 8 if name == "x" else 48
        whole = (source.tokens - 1) // block * block
        assert min(read[name]) >= 0 and max(read[name]) < whole
        # Whatever share a token is in: it differs by one reading at most from every other of that share.
        by_length: dict[int, list[int]] = {}
        owner = {}
        for lane, one in stream._lanes.items():
            if lane[0] == name:
                for index in range(one.samples):
                    for token in range(one.token_offset(index), one.token_offset(index) + lane[1]):
                        assert token not in owner
                        owner[token] = lane[1]
                        by_length.setdefault(lane[1], []).append(read[name][token])
        assert len(owner) == whole  # the shares are the whole text, but for what does not fill a block
        for counts in by_length.values():
            assert max(counts) - min(counts) <= 1
            assert min(counts) >= (0 if edits else 1)


def test_a_rollback_leaves_out_its_samples_and_repeats_none(folder: Path) -> None:
    """Updates 55 to 65, over the border of two stages, and then 62 to 70: what is read or left out is all there is."""
    recipe = make(folder)
    timetable, ledger = Timetable(recipe), begin(recipe)
    left_out: list[range] = []
    for first, last in ((55, 65), (62, 70)):
        start = first_sample(ledger, timetable, first)
        ledger = with_rollback(ledger, recipe, first, last, "a spike")
        left_out.append(range(start, first_sample(ledger, timetable, first)))
    run = run_folder(folder, recipe, ledger)
    steps = {step: {row["sample"] for row in trace(run, step)} for step in range(50, 90)}
    for step, samples in steps.items():
        assert len(samples) == timetable.at(step).global_batch_size
        assert not any(k in span for k in samples for span in left_out)
    total = max(steps[89]) + 1
    stream = SampleStream(recipe.data, recipe.seed, "train", ledger)
    places = [stream.place(k) for k in range(total)]
    # Sources go on over the samples left out as if these had been read: no reading is lost, none comes twice.
    assert len({(p.source, p.epoch, p.index, p.sequence_length) for p in places}) == total
    plain = SampleStream(recipe.data, recipe.seed, "train", begin(recipe))
    assert places[: left_out[0].stop] == [plain.place(k) for k in range(left_out[0].stop)]
    assert [stream.sample_number(p.source, p.epoch, p.index, p.sequence_length) for p in places] == list(range(total))


def test_what_was_read_before_an_edit_is_what_would_have_been(folder: Path) -> None:
    plain, edited = make(folder), make(folder, EDITED)
    ledger = go_on(begin(plain), edited, 75)
    before = Timetable(plain).samples_before(75)
    one = SampleStream(plain.data, plain.seed, "train", begin(plain))
    two = SampleStream(edited.data, edited.seed, "train", ledger)
    assert [one.place(k) for k in range(before)] == [two.place(k) for k in range(before)]
    total = Timetable(plain).samples
    assert [one.place(k) for k in range(before, total)] != [two.place(k) for k in range(before, total)]
    for k in range(total):
        place = two.place(k)
        assert two.sample_number(place.source, place.epoch, place.index, place.sequence_length) == k
    counted = Counter(two.place(k).source for k in range(before, total))
    assert two.sources_in(range(before, total)) == {name: counted[name] for name in "xyz"}


def test_each_rank_count_has_the_same_samples_in_each_step(folder: Path) -> None:
    one, two = make(folder), make(folder, ranks=2)
    for step in (1, 20, 45, 61, 101, 190):
        single = {row["sample"] for row in trace(run_folder(folder, one, begin(one)), step)}
        spread = {row["sample"]: row["rank"] for row in trace(run_folder(folder, two, begin(two)), step)}
        plan = Timetable(one).at(step)
        assert single == set(spread) == set(range(plan.first_sample, plan.first_sample + plan.global_batch_size))
        assert Counter(spread.values()) == {0: len(spread) // 2, 1: len(spread) // 2}


def test_a_new_source_begins_at_its_first_sample_and_a_dropped_one_goes_on_where_it_was(folder: Path) -> None:
    without = make(folder, {n: [("x", 1.0)] for n in range(4)} | {0: [("x", 1.0), ("y", 1.0)], 1: [("z", 1.0)]})
    again = make(folder, {0: [("x", 1.0)], 1: [("z", 1.0)], 2: [("x", 1.0), ("y", 1.0)], 3: [("z", 1.0)]})
    again = again.model_copy(
        update={"stages": [*again.stages[:3], again.stages[3].model_copy(update={"sequence_length": 24})]}
    )
    ledger = go_on(begin(without), again, 30)
    stream = SampleStream(again.data, again.seed, "train", ledger)
    read = [p for p in map(stream.place, range(Timetable(again).samples)) if p.source == "y"]
    samples = stream.sources["y"].samples
    assert [p.epoch for p in read] == [i // samples for i in range(len(read))]
    assert {p.index for p in read[:samples]} == set(range(samples))


def test_a_length_that_a_source_was_not_planned_for_is_refused(folder: Path) -> None:
    recipe = make(folder, {1: [("z", 1.0)], 3: [("z", 1.0)]})
    with pytest.raises(UserError, match=r"source y: .* lengths of \[8\] .* reads it at 24; give that stage a source"):
        SampleStream(recipe.data, 7, "train", go_on(begin(recipe), make(folder), 10))


def test_a_text_too_short_for_its_lengths_is_refused(tmp_path: Path) -> None:
    for name in "xyz":
        write_shard_set(tmp_path / name, [["a" * 60, "b" * 50]], name)
    recipe = make(tmp_path)
    with pytest.raises(UserError, match=r"y/manifest\.json: 112 tokens, expected at least 145 .* 8 and one of 16 and"):
        SampleStream(recipe.data, 7, "train", begin(recipe))
