"""The line filter: trained on pages of some sites it tells lines of other sites apart, in a pipeline and alone."""

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.shared.pages import Page, labelled_lines, made_pages
from data_pipeline.clean import train_noise
from data_pipeline.clean.noise import NoiseSection, line_views
from data_pipeline.transform.base import Draft
from megatron_joy.errors import UserError

NOISE = "Home | About us | Contact | Pricing\nSubscribe to our newsletter and get 10% off your first order"


@pytest.fixture(scope="module")
def pages() -> tuple[list[Page], list[Page]]:
    """Pages of two sets of made sites."""
    return list(made_pages(120, sites=8, seed=3)), list(made_pages(40, sites=4, seed=4))


@pytest.fixture(scope="module")
def model(pages: tuple[list[Page], list[Page]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    with open(folder / "labelled.jsonl", "w") as stream:
        for page in pages[0]:
            lines, keep = labelled_lines(page)
            stream.write(json.dumps({"lines": lines, "keep": keep}) + "\n")
    arguments = ["--documents", str(folder / "labelled.jsonl"), "--out", str(folder / "model")]
    assert train_noise.run(arguments) == 0
    return folder / "model"


def test_lines_of_unseen_sites_are_told_apart(pages: tuple[list[Page], list[Page]], model: Path) -> None:
    block = NoiseSection(kind="noise", model=str(model), most=1.0).make()
    kept: Counter[bool] = Counter()
    removed: Counter[bool] = Counter()
    for page in pages[1]:
        lines, labels = labelled_lines(page)
        draft = Draft("\n".join(lines), None, "a")
        assert block.apply(draft, Counter()) is None
        left = set(draft.text.split("\n"))
        for line, text in zip(lines, labels, strict=True):
            (kept if line in left else removed)[text] += 1
    assert kept[True] > 0.95 * (kept[True] + removed[True])
    assert removed[False] > 0.8 * (kept[False] + removed[False])


def test_blank_lines_stay_where_they_are_and_lines_are_counted(model: Path) -> None:
    prose = "The library reads each file once and keeps what it found in a table that other parts of the program share."
    text = f"{prose}\n\n{prose}\n\n{NOISE}"
    counts: Counter[str] = Counter()
    draft = Draft(text, None, "a")
    assert NoiseSection(kind="noise", model=str(model)).make().apply(draft, counts) is None
    assert draft.text == f"{prose}\n\n{prose}"
    assert counts == {"lines": 4, "noise_lines": 2}


def test_a_document_of_noise_goes(model: Path) -> None:
    text = f"{NOISE}\nShare this: Facebook Twitter LinkedIn"
    assert (
        NoiseSection(kind="noise", model=str(model)).make().apply(Draft(text, None, "a"), Counter()) == "mostly_noise"
    )


def test_one_view_for_each_line_whatever_it_holds() -> None:
    lines = ["a", "1" * 1000, "…", "标题", "x | y › z", "\ufeff"]
    assert len(line_views(lines)) == len(lines)
    assert line_views([]) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"lines": ["a"]}', 'line 1 has no "lines" and "keep"'),
        ("[1]", 'line 1 has no "lines" and "keep"'),
        ('{"lines": ["a", "b"], "keep": [true]}', "line 1 has 2 lines and 1 labels"),
        ('{"lines": [" "], "keep": [true]}', "none of them blank"),
        ('{"lines": ["a"], "keep": [true]}\n{"lines": ["a"], "keep": [true]}', "0 negative"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "a.jsonl").write_text(content + "\n")
    with pytest.raises(UserError, match=says):
        train_noise.run(["--documents", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no linear model"):
        NoiseSection(kind="noise", model=str(tmp_path)).make()
