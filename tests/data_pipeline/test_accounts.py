"""The ledger counts every document and byte where it went; the page shows it and trusts nothing that documents say."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from megatron_joy.cli.data_command import _steps
from megatron_joy.cli.main import main
from megatron_joy.cli.tables import console
from megatron_joy.data.ledger import Ledger, Step, load_ledger
from megatron_joy.data.manifest import load_manifest
from megatron_joy.data.shards import ShardReader
from megatron_joy.errors import UserError
from megatron_joy.report.bars import binned
from megatron_joy.report.data_page import write_data_page
from tests.data_pipeline.corpora import run_inline, texts, write_jsonl, write_pipeline

LONG = texts(80)[:80]
SHORT = ["<script>alert('x')</script>", "<img src=http://example.org/x>", "kurz"]
OTHER = [f"{text} from elsewhere" for text in texts(40, seed=5)[:40]]
ADDRESSES = "write to one@example.org, two@example.org or 8.8.8.8, whoever reads this long line of text"
KEPT = [*LONG, *LONG[:7], "word " * 30 + "   \nend", "1 2 3 4 5 6 7 8 9 0 " * 5, ADDRESSES]  # by length
EXTRA = """
[[transforms]]
kind = "length"
least = 40
sources = ["texts"]
[[transforms]]
kind = "normalise"
[[transforms]]
kind = "pii"
[[score]]
name = "form"
scorer = "heuristic"
keep = { form_letters = { least = 0.2 } }
[[sources]]
name = "other"
reader = "jsonl"
paths = ["IN/more/*.jsonl"]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two sources, the first with short texts, copies, trailing spaces and a broken line."""
    folder, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out")
    write_jsonl(folder / "a.jsonl", [*SHORT, *KEPT])
    with open(folder / "a.jsonl", "ab") as stream:
        stream.write(b"{broken\n")
    write_jsonl(folder / "more" / "b.jsonl", [*OTHER, LONG[3]])
    run_inline(write_pipeline(folder, out, EXTRA.replace("IN", str(folder))))
    return out


def test_every_step_has_what_the_inputs_say(finished: Path) -> None:
    ledger = load_ledger(finished)
    read, length, normalise, pii, deduplicate, score = ledger.sources["texts"]
    assert (read.documents_in, read.dropped) == (len(KEPT) + len(SHORT) + 1, {"broken_json": 1})
    assert length.dropped == {"short": len(SHORT)}
    assert length.bytes_dropped == {"short": sum(len(text.encode()) for text in SHORT)}
    assert length.bytes_changed == 0
    assert normalise.bytes_changed < 0
    ragged = [text for text in KEPT if text != "\n".join(map(str.rstrip, text.split("\n"))).strip("\n")]
    assert (normalise.documents_changed, normalise.counts) == (len(ragged), {})
    assert (pii.documents_changed, pii.counts) == (1, {"email": 2, "ip": 1})
    # Of two sources with one text the first in the pipeline keeps it: the other's is a copy.
    assert deduplicate.dropped == {"exact_duplicate": 7 + 1}
    assert score.dropped == {"score_form_letters": 1}
    other = ledger.sources["other"]
    assert [step.name for step in other] == ["read", "length", "normalise", "pii", "deduplicate", "score"]
    assert other[1].dropped == {}
    assert (other[3].documents_changed, other[3].counts) == (0, {})
    assert other[4].dropped == {}


def test_the_steps_add_up_to_what_the_shards_hold(finished: Path) -> None:
    ledger = load_ledger(finished)
    documents, tokens, lengths = 0, 0, []
    for split in ("train", "validation"):
        manifest = load_manifest(finished / split)
        for entry in manifest.shards:
            reader = ShardReader(finished / split / entry.name)
            documents += len(reader)
            tokens += len(reader.tokens)
            lengths += reader.lengths.tolist()
    assert ledger.steps[-1].documents_out == documents == sum(ledger.lengths)
    assert sum(totals.tokens for totals in ledger.totals.values()) == tokens
    assert ledger.lengths == np.histogram(lengths, 2.0 ** np.arange(len(ledger.lengths) + 1))[0].tolist()
    scored = ledger.steps[-1].documents_in
    assert all(sum(values.values()) == scored for values in ledger.scores.values())


def test_a_ledger_off_by_one_document_or_byte_is_refused(finished: Path, tmp_path: Path) -> None:
    content = json.loads((finished / "ledger.json").read_text())
    for key in ("documents_out", "bytes_out"):
        wrong = json.loads(json.dumps(content))
        wrong["sources"]["texts"][2][key] += 1
        with pytest.raises(ValidationError):
            Ledger.model_validate(wrong)
        (tmp_path / "ledger.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"ledger\.json: .*run the pipeline again"):
            load_ledger(tmp_path)


class Elements(HTMLParser):
    """Names and attributes of all elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_shows_what_went_as_text_and_loads_nothing(finished: Path, tmp_path: Path) -> None:
    page = write_data_page(finished, tmp_path / "page.html").read_text()
    parser = Elements()
    parser.feed(page)
    tags = [tag for tag, _ in parser.found]
    assert not {"script", "img", "link", "iframe", "object"} & set(tags)
    assert all(not {"src", "href", "onload", "onerror"} & set(attributes) for _, attributes in parser.found)
    assert "default-src 'none'; style-src 'sha256-" in page
    assert "&lt;script&gt;alert(" in page
    assert "What steps counted" in page and "<td>email</td>" in page
    for text in ("Dropped: length.short", "Dropped: score_form_letters", "exact_duplicate", "Score form_letters"):
        assert text in page
    ledger = load_ledger(finished)
    bars = re.findall(r'class="bar" x="170" y="[\d.]+" width="([\d.]+)"', page)
    widths = [float(width) for width in bars]
    most = ledger.steps[0].documents_in
    assert widths == pytest.approx([700 * step.documents_out / most for step in ledger.steps], abs=0.1)


def test_stats_prints_the_steps_and_writes_the_page(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "stats", str(finished), "--html", str(tmp_path / "p.html")]) == 0
    printed = capsys.readouterr()
    assert "exact_duplicate" in printed.out
    assert "length" in printed.out
    lines = [line.split() for line in printed.out.splitlines()]
    assert ["changes", "1", "-0.000"] in lines and ["email:", "2"] in lines and ["ip:", "1"] in lines
    assert (tmp_path / "p.html").stat().st_size > 10_000
    assert main(["data", "stats", str(finished / "train"), "--html", str(tmp_path / "q.html")]) == 2
    assert "ledger.json: not there" in capsys.readouterr().err
    assert not (tmp_path / "q.html").exists()


def test_bins_hold_every_value_and_one_wild_one_does_not_squeeze_the_others() -> None:
    values = np.array([*np.linspace(0, 1, 1000), 1e6])
    counts, low, high = binned(values, np.ones(1001, dtype=np.int64), bins=10)
    assert sum(counts) == 1001
    assert (low, high) == (pytest.approx(0.005, abs=0.002), pytest.approx(0.995, abs=0.002))
    assert min(counts) > 80
    assert binned(np.array([3.0]), np.array([5]))[0].count(5) == 1


def test_inspect_tells_what_each_step_made_of_a_document(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = 0
    for split in ("train", "validation"):
        for number in range(load_manifest(finished / split).totals.documents):
            assert main(["data", "inspect", str(finished / split), "--doc", str(number), "--json"]) == 0
            report = json.loads(capsys.readouterr().out)
            steps = ["read", *["length"] * (report["origin"]["source"] == "texts"), "normalise", "pii"]
            assert [step["step"] for step in report["history"]] == steps
            assert report["history"][-1]["bytes"] == report["origin"]["bytes_text"]
            assert set(report["scores"]) == set(load_ledger(finished).scores)
            changed += report["history"][-1]["changed"]
            if number > 20:
                break
    assert changed >= 1


def test_a_history_whose_input_has_changed_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "in" / "a.jsonl", texts(30))
    run_inline(write_pipeline(tmp_path / "in", tmp_path / "out"))
    source.write_bytes(source.read_bytes().replace(b"Text 3:", b"Text 4:"))
    missing = 0
    for split in ("train", "validation"):
        for number in range(load_manifest(tmp_path / "out" / split).totals.documents):
            assert main(["data", "inspect", str(tmp_path / "out" / split), "--doc", str(number), "--json"]) == 0
            report = json.loads(capsys.readouterr().out)
            said = report["history_missing"] or ""
            assert ("gives another text now" in said) == ("Text 3:" in report["text"])
            missing += bool(said)
    assert missing == 1


def test_stats_prints_names_of_benchmarks_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """They are names of files, and square brackets are the terminal library's markup."""
    counts = {"[red]exam[/red]": 3, **{f"quiz {number}": 1 for number in range(9)}}
    step = Step(name="decontaminate", documents_in=12, documents_out=12, bytes_in=1, bytes_out=1, counts=counts)
    console().print(_steps([step]))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "[red]exam[/red]: 3" in lines and "and 2 more in ledger.json" in lines
