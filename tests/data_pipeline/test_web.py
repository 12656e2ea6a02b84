"""The shipped web pipeline on inputs of every kind, as its documentation says: made, run, verified, traced back."""

import json
import sys
from pathlib import Path

import pytest

from data_pipeline.engine import statistics_of
from data_pipeline.transform.chain import account_problems
from megatron_joy.data.manifest import load_manifest
from megatron_joy.data.provenance import read_origins
from megatron_joy.data.verify import verify
from tests.data_pipeline.corpora import run_inline


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the two documented commands were run, with a smaller size."""
    from tools import make_inputs

    folder = tmp_path_factory.mktemp("web")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["make_inputs", "--megabytes", "1.6", "--html"])
        make_inputs.main()
        engine = run_inline(
            Path("web"), "output.keep_work=true", "tokenizer.vocab_size=600", "output.shard_megabytes=0.5"
        )
        for task in statistics_of(engine.job, "read", len(engine.job.plan.tasks)):
            for source in task["sources"].values():
                assert account_problems(*source["read"].values(), source["transforms"]) == []
    return folder


def test_every_kind_of_input_reaches_the_shards_and_the_accounts_close(done: Path) -> None:
    manifest = load_manifest(done / "data" / "web" / "train")
    assert verify(done / "data" / "web" / "train").problems == []
    assert manifest.accounts.difference == 0
    assert {name for name, totals in manifest.sources.items() if totals.documents} >= {
        "crawl",
        "texts",
        "tables",
        "sources",
    }
    assert manifest.languages["en"].documents > 0
    assert {"http_status", "not_html", "url_blocklist.host"} <= set(manifest.accounts.dropped)


def test_blocked_sites_are_gone_and_pages_lead_back_to_their_urls(done: Path) -> None:
    blocked = (done / "data" / "inputs" / "lists" / "blocked" / "domains").read_text().split()
    assert blocked
    urls = []
    for split in ("train", "validation"):
        for entry in load_manifest(done / "data" / "web" / split).shards:
            origins = read_origins(done / "data" / "web" / split / str(entry.provenance))
            urls += [(origin.url, origin.language) for origin in origins if origin.source == "crawl"]
    assert len(urls) > 20
    assert all(url and url.split("/")[2] not in blocked and language == "en" for url, language in urls)


def test_samples_of_what_was_dropped_name_their_place(done: Path) -> None:
    rows = [json.loads(line) for line in (done / "data" / "web" / "dropped_samples.jsonl").read_text().splitlines()]
    dropped = load_manifest(done / "data" / "web" / "train").accounts.dropped
    assert {row["reason"] for row in rows if "." in row["reason"]} == {reason for reason in dropped if "." in reason}
    assert all(row["source"] and row["file"] and row["excerpt"].strip() for row in rows)
