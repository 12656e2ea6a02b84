"""Repeated lines in a pipeline: gone from all documents but the first that stays, whatever memory and shards."""

import json
from pathlib import Path

import pytest

from data_pipeline.dedup import lines_stage
from data_pipeline.dedup.lines import SpanSettings
from megatron_joy.cli.main import main
from megatron_joy.data.ledger import load_ledger
from megatron_joy.data.manifest import load_manifest
from megatron_joy.data.provenance import read_origins
from megatron_joy.data.verify import verify
from tests.data_pipeline.corpora import digests, documents_of, run_inline, texts, write_jsonl, write_pipeline
from tests.data_pipeline.dedup.test_lines import plain

FOOTER = "Subscribe to our newsletter, it is free of charge\nAll rights reserved\nby the publisher of this very page"
MENU = "Home and garden and news\nSports and weather and more\nContact and imprint and jobs"
STORIES = [text for text in texts(120) if text.strip()]
SHORT_FOOTER = "\n".join(FOOTER.split("\n")[1:])  # a span shorter than three lines stays
DOCUMENTS = [
    *(f"{MENU}\n\n{story}\n{FOOTER}" for story in STORIES[:50]),
    *(f"{story}\n{FOOTER}" for story in STORIES[50:80]),
    *(f"{story}\n{SHORT_FOOTER}" for story in STORIES[80:]),
    f"{FOOTER}\n{MENU}",
    FOOTER,
]
SECTION = """
[repeated_lines]
enabled = true
least_bytes = 40
"""


def run(folder: Path, out: Path, *overrides: str) -> Path:
    run_inline(write_pipeline(folder, out, SECTION, validation_share=0.2, shard_megabytes=0.004), *overrides)
    return out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    write_jsonl(folder / "a.jsonl", DOCUMENTS[:70])
    write_jsonl(folder / "b.jsonl", DOCUMENTS[70:])
    return folder


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(corpus, tmp_path_factory.mktemp("out"))


def in_order(folder: Path, out: Path) -> list[str]:
    """The documents of a run without the section, in the order of the shards, the training set's first."""
    run_inline(write_pipeline(folder, out, validation_share=0.2, shard_megabytes=0.004))
    assert len(load_manifest(out / "train").shards) > 3
    return [text for split in ("train", "validation") for text in documents_of(out / split)]


def test_every_text_is_what_the_plain_way_leaves_of_it(corpus: Path, finished: Path, tmp_path: Path) -> None:
    before = in_order(corpus, tmp_path)
    expected = [text for text in plain(before, SpanSettings(3, 40)) if text.strip()]
    found = [text for split in ("train", "validation") for text in documents_of(finished / split)]
    assert found == expected
    assert len(found) < len(before)
    assert sum(FOOTER in text for text in found) == sum(MENU in text for text in found) == 1
    assert not any(verify(finished / split).problems for split in ("train", "validation"))


def test_the_ledger_tells_what_was_cut(finished: Path) -> None:
    (step,) = [step for step in load_ledger(finished).steps if step.name == "repeated_lines"]
    found = [text for split in ("train", "validation") for text in documents_of(finished / split)]
    assert (step.documents_in, step.documents_out) == (len(DOCUMENTS), len(found))
    assert step.documents_changed == len([text for text in found if text not in DOCUMENTS])
    assert step.counts["lines"] >= 3 * 79
    assert step.bytes_out == sum(len(text.encode()) for text in found)


def test_origins_hold_the_hash_of_the_text_that_is_written(finished: Path) -> None:
    from data_pipeline.spool import text_hash

    for split in ("train", "validation"):
        entries = load_manifest(finished / split).shards
        origins = [one for entry in entries for one in read_origins(finished / split / str(entry.provenance))]
        texts = documents_of(finished / split)
        assert [origin.blake3 for origin in origins] == [text_hash(text.encode()).hex() for text in texts]


@pytest.mark.parametrize("shares", [1, 3])
def test_neither_shares_nor_memory_change_a_byte(
    corpus: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: int
) -> None:
    from data_pipeline.dedup import external

    monkeypatch.setattr(lines_stage, "SHARES", shares)
    monkeypatch.setattr(external.RowSorter.__init__, "__defaults__", (7,))
    assert digests(run(corpus, tmp_path)) == digests(finished)


def test_lines_of_documents_that_go_are_not_repeated_by_others(tmp_path: Path) -> None:
    """Of two near-duplicates one goes; a third document's lines, which only the one that went had too, stay."""
    body = " ".join(f"word{number}" for number in range(1000))
    write_jsonl(tmp_path / "in" / "a.jsonl", [f"{body} more\n{FOOTER}", f"{body}\n{MENU}", f"other text\n{MENU}"])
    near = "\n[near_duplicates]\nenabled = true\n"
    run_inline(write_pipeline(tmp_path / "in", tmp_path / "out", SECTION + near, validation_share=0.0))
    assert sorted(documents_of(tmp_path / "out" / "train")) == [f"other text\n{MENU}", f"{body} more\n{FOOTER}"]


def test_inspect_tells_that_lines_were_cut(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = 0
    for number in range(load_manifest(finished / "train").totals.documents):
        assert main(["data", "inspect", str(finished / "train"), "--doc", str(number), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        steps = [(step["step"], step["changed"]) for step in report["history"]]
        assert steps[0] == ("read", False)
        assert steps[1:] in ([], [("repeated_lines", True)])
        cut += len(steps) - 1
    assert cut > 50


def test_a_setting_without_the_section_is_refused(corpus: Path, tmp_path: Path) -> None:
    pipeline = write_pipeline(corpus, tmp_path)
    with pytest.raises(Exception, match=r"repeated_lines\.lines: has no effect without repeated_lines\.enabled = true"):
        run_inline(pipeline, "repeated_lines.lines=2")
