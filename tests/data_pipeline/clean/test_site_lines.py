"""Boilerplate by site: exactly the lines on enough of a site's pages go, numbers and case aside, and no others."""

from collections import Counter
from pathlib import Path

import orjson
import pytest

from benchmarks.shared.pages import made_pages, visible_text
from data_pipeline.clean import find_site_lines
from data_pipeline.clean.site_lines import SiteLinesSection, site_of
from data_pipeline.transform.base import Draft
from megatron_joy.data.manifest import load_manifest
from megatron_joy.errors import UserError
from tests.data_pipeline.corpora import run_inline, write_pipeline


def site_pages() -> list[tuple[str, str]]:
    """(URL, text): a.example has one line on all ten pages, one on four, one on three; b.example has the first once."""
    found = []
    for number in range(10):
        lines = [f"Copyright {2010 + number} ALL rights" if number % 2 else f"copyright {2010 + number} all  rights"]
        lines += [f"text of page number {chr(97 + number)} stands here"]
        lines += ["on four pages"] * (number < 4) + ["on three pages"] * (number < 3)
        found.append((f"https://www.a.example/{number}", "\n".join(lines)))
    return [*found, ("https://b.example/", "Copyright 2011 all rights\nother text"), ("no url", "on four pages")]


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    rows = [{"text": text, "u": url} for url, text in site_pages()]
    (tmp_path / "a.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    transforms = f'[[transforms]]\nkind = "site_lines"\nlines = "{tmp_path}/lines"\n'
    path = write_pipeline(tmp_path, tmp_path / "out", extra=transforms)
    path.write_text(path.read_text().replace('reader = "jsonl"', 'reader = "jsonl"\nurl_field = "u"'))
    return path


def without(folder: Path, url: str, text: str) -> str:
    draft = Draft(text, url, "a")
    assert SiteLinesSection(kind="site_lines", lines=str(folder)).make().apply(draft, Counter()) is None
    return draft.text


def test_lines_on_enough_pages_of_their_site_go_and_no_others(
    pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = pipeline.parent / "lines"
    assert find_site_lines.run([str(pipeline), "--out", str(out), "--pages", "4", "--share", "0.4"]) == 0
    assert orjson.loads(capsys.readouterr().out) == {"pages": 11, "sites": 2, "lines": 2}
    for number, (url, text) in enumerate(site_pages()[:10]):
        expected = [f"text of page number {chr(97 + number)} stands here"] + ["on three pages"] * (number < 3)
        assert without(out, url, text) == "\n".join(expected)
    for url, text in site_pages()[10:]:
        assert without(out, url, text) == text
    run_inline(pipeline)
    manifest = load_manifest(pipeline.parent / "out" / "train")
    assert manifest.accounts.difference == 0


@pytest.mark.parametrize(
    ("pages", "share", "lines"), [(3, 0.3, 3), (4, 0.4, 2), (4, 0.41, 1), (11, 0.1, 0), (5, 1.0, 1)]
)
def test_both_bounds_count(
    pipeline: Path, capsys: pytest.CaptureFixture[str], pages: int, share: float, lines: int
) -> None:
    out = str(pipeline.parent / "lines")
    find_site_lines.run([str(pipeline), "--out", out, "--pages", str(pages), "--share", str(share)])
    assert orjson.loads(capsys.readouterr().out)["lines"] == lines


def test_notices_of_made_sites_go_and_their_text_stays(tmp_path: Path) -> None:
    pages = list(made_pages(120, sites=4, seed=5))
    lines = [[line.strip() for line in visible_text(page.html).split("\n")] for page in pages]
    sites = [str(site_of(page.url)) for page in pages]
    find_site_lines.find_lines(iter(zip(sites, lines, strict=True)), 10, 0.5, tmp_path)
    removed = kept_text = all_text = notices = 0
    for page, own in zip(pages, lines, strict=True):
        left = without(tmp_path, page.url, "\n".join(own))
        notices += sum(line in page.noise[-3:] for line in own)
        removed += sum(line in page.noise[-3:] and line not in left for line in own)
        all_text += sum(line in page.main for line in own)
        kept_text += sum(line in page.main and line in left for line in own)
    assert removed == notices > 200
    assert kept_text > 0.99 * all_text > 300


def test_mistakes_are_one_line(tmp_path: Path, pipeline: Path) -> None:
    with pytest.raises(UserError, match="no list of lines"):
        SiteLinesSection(kind="site_lines", lines=str(tmp_path / "nowhere")).make()
    with pytest.raises(UserError, match="expects 2 or more"):
        find_site_lines.run([str(pipeline), "--out", str(tmp_path / "x"), "--pages", "1"])
    plain = write_pipeline(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match='no transform kind = "site_lines"'):
        find_site_lines.run([str(plain), "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
