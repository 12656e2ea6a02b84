"""`make data-<stage>`: each stage of the pipeline has a shipped example, and it shows what the stage does."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from data_pipeline.config import SHIPPED
from megatron_joy.data.ledger import load_ledger
from megatron_joy.data.manifest import Manifest, load_manifest
from megatron_joy.data.provenance import DocumentOrigin, read_origins
from megatron_joy.data.shards import ShardReader
from megatron_joy.data.verify import verify
from tests.data_pipeline.corpora import documents_of, run_inline

ROOT = Path(__file__).parents[2]
STAGES = ("read", "extract", "clean", "pii", "decontaminate", "dedup", "score", "code", "chunk", "mix", "tokenise")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples' inputs, smaller than `make` makes them."""
    from tools import make_inputs

    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["make_inputs", "--out", "data/stages/inputs", "--megabytes", "1.2", "--html"])
        make_inputs.main()
    return folder


def origins_of(out: Path) -> list[DocumentOrigin]:
    """The origins of the training set's documents, in the order of the shards."""
    entries = load_manifest(out / "train").shards
    return [origin for entry in entries for origin in read_origins(out / "train" / str(entry.provenance))]


def shows_its_stage(stage: str, out: Path, manifest: Manifest) -> bool:
    """Whether the output has what only this stage can have done."""
    dropped, origins = manifest.accounts.dropped, origins_of(out)
    if stage == "read":
        return all(totals.documents for totals in manifest.sources.values()) and len(manifest.sources) == 6
    if stage == "extract":
        return not any("<p>" in text or "<html" in text for text in documents_of(out / "train"))
    if stage == "clean":
        kept = {name for name, totals in manifest.languages.items() if totals.documents}
        return {"url_blocklist.host", "gopher_repetition.repeated_grams"} <= set(dropped) and kept <= {"en", "zh"}
    if stage == "pii":
        texts = "".join(documents_of(out / "train"))
        return not re.search(r"[a-z0-9.]{3,}@[a-z0-9]{3,}\\.(com|org)\\b", texts) and "<EMAIL" in texts.upper()
    if stage == "chunk":
        return max(origin.part for origin in origins) > 0 and max(origin.bytes_text for origin in origins) < 6000
    if stage == "mix":
        names = [origin.source for origin in origins]
        changes = sum(left != right for left, right in pairwise(names))
        return changes > 0.3 * len(names)
    if stage == "tokenise":
        return (manifest.dtype, manifest.tokenizer.vocab_size) == ("int32", 129_280)
    if stage == "code":  # the same files, one by one and as long documents
        files, repositories = (manifest.sources[name] for name in ("sources", "repositories"))
        return files.documents > 2 * repositories.documents > 0 and files.bytes_text < 2 * repositories.bytes_text
    expected = {"decontaminate": "contaminated", "dedup": "near_duplicate", "score": "score_form_compression"}
    return expected[stage] in dropped


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_has_an_example_that_runs_and_shows_it(
    folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    run_inline(Path(f"stage_{stage}"))
    out = folder / "data" / "stages" / stage
    for split in ("train", "validation"):
        assert verify(out / split).problems == []
        assert len(ShardReader(out / split / load_manifest(out / split).shards[0].name)) > 0
    assert load_ledger(out).steps[0].name == "read"
    manifest = load_manifest(out / "train")
    assert shows_its_stage(stage, out, manifest), manifest.accounts


def test_make_has_a_target_for_every_example_and_lists_them() -> None:
    assert {path.stem.removeprefix("stage_") for path in SHIPPED.glob("stage_*.toml")} == set(STAGES)
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert " ".join(STAGES) in shown
    for stage in STAGES:
        planned = subprocess.run(["make", "-n", f"data-{stage}"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert f"data run stage_{stage}" in planned.stdout
