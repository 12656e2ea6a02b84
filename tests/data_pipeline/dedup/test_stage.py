"""Near-duplicates in a whole run: one of each cluster is written, accounts close, earlier data comes first."""

import random
from pathlib import Path

import pytest

from data_pipeline.config import load_pipeline
from data_pipeline.dedup.stage import SIGNATURES
from data_pipeline.engine import Engine, statistics_of
from data_pipeline.finish import tidy
from data_pipeline.spool import text_hash
from megatron_joy.data.manifest import load_manifest
from megatron_joy.data.provenance import read_origins
from megatron_joy.errors import UserError
from tests.data_pipeline.corpora import digests, run_inline, write_jsonl, write_pipeline

NEAR = "near_duplicates.enabled=true"


def documents(count: int, seed: int) -> list[str]:
    """Different texts of 120 to 200 words."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(4000)}" for _ in range(rng.randrange(120, 200))) for _ in range(count)]


def near(text: str, word: str) -> str:
    """The text with one word added at its end: longer, and almost the same shingles."""
    return f"{text} {word}"


def kept(out: Path) -> set[str]:
    """Hashes of all texts written."""
    found = set()
    for split in ("train", "validation"):
        for entry in load_manifest(out / split).shards:
            assert entry.provenance is not None
            found |= {origin.blake3 for origin in read_origins(out / split / entry.provenance)}
    return found


def hashes(texts: list[str]) -> set[str]:
    return {text_hash(text.encode()).hex() for text in texts}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Files with near-duplicates within and across them, exact copies too; and the texts that should stay."""
    folder = tmp_path_factory.mktemp("near")
    base = documents(90, seed=1)
    longer = [near(text, f"more{number}") for number, text in enumerate(base[:30])]
    write_jsonl(folder / "a.jsonl", [*base[:60], base[5], *longer[:10]])
    write_jsonl(folder / "b.jsonl", [*base[60:], *longer[10:], longer[0], base[40]])
    return folder, [*longer, *base[30:]]


@pytest.fixture(scope="module")
def finished(corpus: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Engine]:
    out = tmp_path_factory.mktemp("out")
    return out, run_inline(write_pipeline(corpus[0], out), NEAR)


def test_one_of_each_cluster_is_written_the_longest(
    corpus: tuple[Path, list[str]], finished: tuple[Path, Engine]
) -> None:
    assert kept(finished[0]) == hashes(corpus[1])


def test_every_record_is_accounted_for(corpus: tuple[Path, list[str]], finished: tuple[Path, Engine]) -> None:
    out, engine = finished
    manifest = load_manifest(out / "train")
    assert manifest.accounts.documents_in == 123
    assert manifest.accounts.dropped["near_duplicate"] == 30
    assert manifest.accounts.dropped["exact_duplicate"] == 3
    (clusters,) = statistics_of(engine.job, "cluster", 1)
    # Exact copies are in the clusters as well: of base 5 and longer 0 a second one, base 40 a pair of its own.
    assert clusters["clusters_by_size"] == {"2": 29, "3": 2}


def test_how_work_is_cut_changes_nothing_that_is_kept(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    out = tmp_path / "whole"
    run_inline(write_pipeline(corpus[0], out, shard_megabytes=10), NEAR)
    assert kept(out) == hashes(corpus[1])


def test_run_again_after_tidying_gives_the_same_bytes(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    path = write_pipeline(corpus[0], tmp_path / "out")
    engine = run_inline(path, NEAR)
    before = digests(tmp_path / "out")
    tidy(engine.job)
    assert not (tmp_path / "out" / SIGNATURES).exists()
    assert engine.unfinished() == []
    engine.job.record_path("write", 0).unlink()
    run_inline(path, NEAR)
    assert digests(tmp_path / "out") == before


def test_documents_of_an_earlier_pipeline_come_first(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    keep = [NEAR, "near_duplicates.keep_signatures=true"]
    tidy(run_inline(write_pipeline(corpus[0], tmp_path / "old"), *keep).job)
    later = tmp_path / "later"
    fresh = documents(40, seed=9)
    write_jsonl(later / "c.jsonl", [*fresh, *(near(text, "appended") for text in corpus[1][:50])])
    path = write_pipeline(later, tmp_path / "new")
    run_inline(path, NEAR, f'near_duplicates.against=["{tmp_path}/old/{SIGNATURES}"]')
    assert kept(tmp_path / "new") == hashes(fresh)
    with pytest.raises(UserError, match="holds no signatures"):
        run_inline(path, NEAR, f'near_duplicates.against=["{tmp_path}/nowhere"]')
    with pytest.raises(UserError, match="is this pipeline's own"):
        run_inline(path, NEAR, f'near_duplicates.against=["{tmp_path}/new/{SIGNATURES}"]')


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["near_duplicates.threshold=0.8"], "near_duplicates.threshold: has no effect without"),
        ([NEAR, "near_duplicates.bands=7"], "near_duplicates.bands = 7: does not divide 128"),
        (
            [NEAR, "near_duplicates.threshold=0.6"],
            "near_duplicates.threshold = 0.6: 16 bands find 23.7% of such pairs, expected 80% or more; set "
            "near_duplicates.bands = 32, or a higher threshold",
        ),
        (
            [NEAR, "near_duplicates.threshold=0.01", "near_duplicates.bands=64"],
            "near_duplicates.threshold = 0.01: 64 bands find 0.6% of such pairs",
        ),
        ([NEAR, "near_duplicates.threshold=1.5"], "near_duplicates.threshold = 1.5: expects"),
    ],
)
def test_a_mistake_is_one_line(
    corpus: tuple[Path, list[str]], tmp_path: Path, override: list[str], message: str
) -> None:
    path = write_pipeline(corpus[0], tmp_path)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        load_pipeline(str(path), override)
