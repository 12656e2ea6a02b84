"""Decontamination in a whole run: what holds an item goes and is reported, accounts close, nothing else goes."""

import random
from collections import Counter
from pathlib import Path

import orjson
import pytest

from data_pipeline.config import load_pipeline
from data_pipeline.decontaminate.stage import REPORT
from data_pipeline.engine import Engine, statistics_of
from megatron_joy.data.ledger import load_ledger
from megatron_joy.data.manifest import load_manifest
from megatron_joy.data.verify import verify
from megatron_joy.errors import UserError
from tests.data_pipeline.corpora import run_inline, write_jsonl, write_pipeline

COMMON = "choose the one option that best answers the question and explain your answer in full sentences please"


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(10**5)}" for _ in range(count))


def overrides(evaluation: Path) -> list[str]:
    return ["decontaminate.enabled=true", f'decontaminate.evaluation="{evaluation}"', "near_duplicates.enabled=true"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Engine]:
    """60 plain documents, 30 with common wording, 7 with an item, an exact and a near-duplicate of two of those."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(1)
    items = [f"{COMMON} {words(rng, 30)}" for _ in range(10)]
    write_jsonl(folder / "evaluation" / "exam.jsonl", items[:5])
    write_jsonl(folder / "evaluation" / "quiz.jsonl", items[5:])
    clean = [words(rng, 120) for _ in range(60)] + [f"{words(rng, 100)} {COMMON}" for _ in range(30)]
    dirty = [f"{words(rng, 80)} {item} {words(rng, 80)}" for item in items[:7]]
    write_jsonl(folder / "corpus.jsonl", [*clean, *dirty, dirty[0], f"{dirty[1]} more"])
    out = tmp_path_factory.mktemp("out")
    return out, run_inline(write_pipeline(folder, out), *overrides(folder / "evaluation"))


def test_what_holds_an_item_goes_and_accounts_close(finished: tuple[Path, Engine]) -> None:
    out, engine = finished
    accounts = load_manifest(out / "train").accounts
    assert accounts.documents_in == 99
    dropped = {name: count for name, count in accounts.dropped.items() if name != "validation_split"}
    assert dropped == {"exact_duplicate": 1, "near_duplicate": 1, "contaminated": 7}
    assert sum(load_manifest(out / split).totals.documents for split in ("train", "validation")) == 90
    assert not any(verify(out / split).problems for split in ("train", "validation"))
    (counts,) = statistics_of(engine.job, "contamination", 1)
    assert counts["items"] == 10
    (step,) = [step for step in load_ledger(out).steps if step.name == "decontaminate"]
    assert step.counts == {"exam": 5, "quiz": 2}
    assert counts["whitelisted"] == 10 * (len(COMMON.split()) - 12)


def test_each_removal_is_reported_with_its_item_and_place(finished: tuple[Path, Engine]) -> None:
    rows = [orjson.loads(line) for line in (finished[0] / REPORT).read_bytes().splitlines()]
    assert Counter((row["benchmark"], row["line"]) for row in rows) == {
        **{("exam", line): 1 for line in range(1, 6)},
        **{("quiz", line): 1 for line in (1, 2)},
    }
    for row in rows:
        with open(row["file"], "rb") as stream:
            stream.seek(row["offset"])
            assert COMMON in orjson.loads(stream.readline())["text"]
        assert row["hits"] == row["grams"] and row["whitelisted"] == len(COMMON.split()) - 12


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["decontaminate.enabled=true"], "decontaminate.evaluation: missing"),
        (["decontaminate.common=3"], "decontaminate.common: has no effect without"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, keys: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_pipeline(str(write_pipeline(tmp_path, tmp_path / "out")), keys)


def test_a_folder_without_items_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["some text"])
    path = write_pipeline(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match=r"nothing: no \.jsonl file"):
        run_inline(path, *overrides(tmp_path / "nothing"))
