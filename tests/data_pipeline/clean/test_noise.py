"""The line filter: trained on pages of some sites it tells lines of other sites apart; it equals plain Python."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.shared.pages import Page, labelled_lines, made_pages
from data_pipeline.clean import train_noise
from data_pipeline.clean.noise import (
    BLANK,
    CAPITAL,
    DIGIT,
    END_SHIFT,
    ENDS,
    MARK,
    MARKS,
    NoiseSection,
    _classes,
    line_chances,
    line_features,
)
from data_pipeline.environment import environment_files
from data_pipeline.score.linear import LinearScorer, load_linear
from data_pipeline.transform.base import Draft
from megatron_joy.errors import UserError
from tests.data_pipeline.clean.slow_noise import filtered, line_views
from tests.data_pipeline.score.slow_linear import features
from tests.data_pipeline.test_hostile_text import within

NOISE = "Home | About us | Contact | Pricing\nSubscribe to our newsletter and get 10% off your first order"
BITS = 10  # so few that different words share a place
SCORER = LinearScorer("any", np.random.default_rng(7).normal(size=1 << BITS).astype(np.float32), 0.2)
# What a line may begin, end and be cut with, what is blank or a digit to Python alone, and what folds to many words.
SYMBOLS = (
    *"aZéǅΩ_0٣²Ⅷ½ßİ文かไ😀㌖ﷺ",
    *".!?:,…。！？|›»•·/©>#'-\u200b\ufeff\u00ad\U000e0100\U0010ffff\x00",
    *" \t\r\v\f\x1c\x1f\x85\xa0\u2028\u3000",
)
PARTS = (
    "\n",
    "\n",
    "\n",
    " ",
    "Home",
    "the end",
    "12",
    "\n\n",
    " \n",
    "| ",
    "word " * 90,
    "x" * 399,
    "Ж" * 401,
    "文" * 150,
)
TEXTS = st.lists(st.one_of(st.sampled_from(SYMBOLS), st.sampled_from(PARTS), st.characters()), max_size=80).map("".join)


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


def test_each_code_point_is_what_python_takes_it_for() -> None:
    for point, entry in enumerate(_classes().tolist()):
        character = chr(point)
        assert bool(entry & BLANK) == character.isspace() == (not character.strip()), hex(point)
        assert bool(entry & CAPITAL) == character.isupper(), hex(point)
        assert bool(entry & DIGIT) == character.isdigit(), hex(point)
        assert bool(entry & MARK) == (character in MARKS), hex(point)
        assert entry >> END_SHIFT == ENDS.get(character, 0), hex(point)


@settings(max_examples=150, deadline=None)
@example("")
@example("\n \n")
@example(
    "\n".join("a" * length for length in (1, 5, 6, 12, 13, 25, 26, 40, 41, 60, 61, 90, 91, 140, 141, 220, 221, 999))
)
@example("One\n\n" * 300 + "two")
@given(TEXTS)
def test_what_the_model_sees_of_any_line_is_what_plain_python_shows_it(text: str) -> None:
    assert [places.tolist() for places in line_features(text, 16)] == [features(view, 16) for view in line_views(text)]
    chances, solid = line_chances(SCORER, text)
    blank = [not line.strip() for line in text.split("\n")]
    assert np.isnan(chances).tolist() == blank
    assert solid == blank.count(False)
    expected = filtered(text, SCORER.weights, SCORER.bias, 0.5, 1.0)[2]
    assert chances[~np.isnan(chances)] == pytest.approx(np.array(expected), abs=1e-6)


def test_training_sees_what_the_filter_sees(pages: tuple[list[Page], list[Page]]) -> None:
    lines = "\n".join(labelled_lines(pages[0][0])[0])
    seen = line_features(lines, BITS)
    sums = np.array([SCORER.weights[places].sum(dtype=np.float64) / np.sqrt(len(places)) for places in seen])
    assert SCORER.chances(sums) == pytest.approx(line_chances(SCORER, lines)[0], abs=1e-6)


@pytest.mark.parametrize(("threshold", "most"), [(0.3, 0.7), (0.5, 0.2), (0.0, 0.0), (1.0, 1.0)])
def test_documents_leave_as_plain_python_leaves_them(
    pages: tuple[list[Page], list[Page]], model: Path, threshold: float, most: float
) -> None:
    texts = ["\n".join(labelled_lines(page)[0]) for page in pages[1]]
    files = environment_files("package_documentation")[:30]
    texts += [Path(file.location).read_bytes().decode("utf-8", "replace")[:4000] for file in files]
    scorer = load_linear(model)
    block = NoiseSection(kind="noise", model=str(model), threshold=threshold, most=most).make()
    for text in texts:
        counts: Counter[str] = Counter()
        draft = Draft(text, None, "a")
        reason = block.apply(draft, counts)
        expected, left, chances = filtered(text, scorer.weights, scorer.bias, threshold, most)
        assert (reason, draft.text) == (expected, left)
        assert counts == {"lines": len(chances), "noise_lines": sum(chance < threshold for chance in chances)}


@pytest.mark.parametrize("unit", ["a\n", "\n", "a ", "㌖", "x", "\u3000", "1|", " \n\u2028"])
def test_a_document_of_megabytes_is_judged_in_a_while(unit: str) -> None:
    text = unit * (4_000_000 // len(unit))
    _, solid = within(lambda: line_chances(SCORER, text))
    assert solid == sum(bool(line.strip()) for line in text.split("\n"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"lines": ["a"]}', 'line 1 has no "lines" and "keep"'),
        ("[1]", 'line 1 has no "lines" and "keep"'),
        ('{"lines": ["a", "b"], "keep": [true]}', "line 1 has 2 lines and 1 labels"),
        ('{"lines": [" "], "keep": [true]}', "none of them blank"),
        ('{"lines": ["a\\nb"], "keep": [true]}', "or with a line feed inside"),
        ('{"lines": ["a"], "keep": [true]}\n{"lines": ["a"], "keep": [true]}', "0 negative"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "a.jsonl").write_text(content + "\n")
    with pytest.raises(UserError, match=says):
        train_noise.run(["--documents", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no linear model .*train_noise"):
        NoiseSection(kind="noise", model=str(tmp_path)).make()
