"""Planted items are found, common wording deletes nothing, and each removal names its benchmark and item."""

import random
from pathlib import Path

import numpy as np
import orjson
import pytest

from data_pipeline.decontaminate.contamination import Finding, count_unrelated, judge, whitelist_of
from data_pipeline.decontaminate.evaluation import EvaluationIndex, index_items, read_items
from megatron_joy.errors import UserError

COMMON = "choose the one option that best answers the question and explain your answer in full sentences please"


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(10**6)}" for _ in range(count))


@pytest.fixture(scope="module")
def items() -> list[str]:
    """60 items of 40 words that all begin with the same common wording."""
    rng = random.Random(1)
    return [f"{COMMON} {words(rng, 40)}" for _ in range(60)]


@pytest.fixture(scope="module")
def index(items: list[str]) -> EvaluationIndex:
    return index_items(iter([(f"exam{number % 2}", number, text) for number, text in enumerate(items)]))


@pytest.fixture(scope="module")
def corpus(items: list[str]) -> list[tuple[str, int | None]]:
    """Documents with the item that was planted in them: whole, its latter half, edited; others with common wording."""
    rng = random.Random(2)
    found: list[tuple[str, int | None]] = [(words(rng, 300), None) for _ in range(300)]
    found += [(f"{words(rng, 100)} {COMMON} {words(rng, 100)}", None) for _ in range(100)]
    for number, item in enumerate(items[:40]):
        half = " ".join(item.split()[-25:])
        edited = item.split()
        edited[len(edited) - 20] = "otherwise"
        for form in (item, half, " ".join(edited).upper()):
            found.append((f"{words(rng, 120)}, {form}. {words(rng, 120)}", number))
    return found


def test_planted_items_are_all_found_and_common_wording_deletes_nothing(
    index: EvaluationIndex, items: list[str], corpus: list[tuple[str, int | None]]
) -> None:
    encoded = [text.encode() for text, _ in corpus]
    whitelist = whitelist_of(count_unrelated(index, map(index.grams_in, encoded)))
    assert whitelist.sum() == len(items) * (len(COMMON.split()) - 12)
    findings = [judge(index, whitelist, index.grams_in(text)) for text in encoded]
    missed = sum(found is None for found, (_, planted) in zip(findings, corpus, strict=True) if planted is not None)
    wrong = sum(found is not None for found, (_, planted) in zip(findings, corpus, strict=True) if planted is None)
    assert (missed, wrong) == (0, 0)
    for found, (_, planted) in zip(findings, corpus, strict=True):
        if found is not None:
            assert (found.benchmark, found.line) == (f"exam{planted % 2}", planted)


def test_without_the_whitelist_common_wording_deletes_documents(
    index: EvaluationIndex, corpus: list[tuple[str, int | None]]
) -> None:
    nothing = np.zeros(len(index.owners), dtype=bool)
    wrong = [
        text for text, planted in corpus if planted is None and judge(index, nothing, index.grams_in(text.encode()))
    ]
    assert len(wrong) == 100


def test_many_copies_of_an_item_do_not_whitelist_it(index: EvaluationIndex, items: list[str]) -> None:
    copies = [f"mirror {number} {items[3]}".encode() for number in range(50)]
    whitelist = whitelist_of(count_unrelated(index, map(index.grams_in, copies)))
    assert not whitelist[index.owners == 3].any()
    assert whitelist.any()  # for the other items, whose common wording the copies hold
    grams = len(items[3].split()) - 12
    assert judge(index, whitelist, index.grams_in(copies[0])) == Finding("exam1", 3, grams, grams, 0)


def test_counts_of_parts_add_up(index: EvaluationIndex, corpus: list[tuple[str, int | None]]) -> None:
    encoded = [text.encode() for text, _ in corpus]
    parts = sum(count_unrelated(index, map(index.grams_in, part)) for part in (encoded[:123], encoded[123:]))
    assert np.array_equal(parts, count_unrelated(index, map(index.grams_in, encoded)))


def test_short_items_are_found_whole_and_too_short_ones_left_out() -> None:
    texts = [("short", 1, "nine words that make one whole item by themselves"), ("short", 2, "too short")]
    index = index_items(iter(texts))
    assert index.lengths == (9, 13)
    assert [item.grams for item in index.items] == [1, 0]
    nothing = np.zeros(1, dtype=bool)
    found = judge(index, nothing, index.grams_in(b"NINE words that make one whole item, by themselves! after " * 2))
    assert found == Finding("short", 1, 1, 1, 0)
    assert judge(index, nothing, index.grams_in(b"nine words that make one item by themselves")) is None


def test_chinese_items_are_found_by_character() -> None:
    item = "小明有三个苹果他又买了五个苹果请问他现在一共有多少个苹果"
    index = index_items(iter([("math", 1, item)]))
    grams = index.grams_in(f"题目：{item}？答案：八".encode())
    assert judge(index, np.zeros(len(index.owners), dtype=bool), grams) is not None


def test_items_are_read_from_fields_at_any_depth(tmp_path: Path) -> None:
    line = {"question": "What is it?", "choices": [{"text": "a thing"}, "two"], "id": 3, "note": "left out"}
    (tmp_path / "quiz.jsonl").write_bytes(orjson.dumps(line) + b"\n\n")
    assert list(read_items(tmp_path)) == [("quiz", 1, "What is it?\na thing\ntwo\nleft out")]
    assert list(read_items(tmp_path, ["question", "choices"])) == [("quiz", 1, "What is it?\na thing\ntwo")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no .jsonl file"),
        (b"{", "line 1 is not JSON"),
        (b'{"question": 3}', "line 1 has no text, expected a string"),
    ],
)
def test_a_wrong_folder_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_items(tmp_path))
