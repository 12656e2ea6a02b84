"""Long documents cut at double newlines into chunks of about so many tokens, without cutting sense.

Section 2.3.3 of arXiv 2604.03044 cuts documents made from PDF at double newlines toward 4,096 tokens. What it leaves
open: blocks are packed greedily in their order; a block that is longer than a chunk stays whole up to 1.25 times its
length, and beyond that is cut at ends of sentences, or of lines, or of words, whichever comes first in this order.
"""

import re
from collections.abc import Callable, Iterator

WHOLE = 1.25  # times the length of a chunk that one block may have
_BLOCKS = re.compile(r"\n[ \t]*\n\s*")
# Where a text may be cut, best first: after a sentence (also Chinese and Japanese ones), a line, a word; then anywhere.
_SENTENCE = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|(?<=[。！？])[”’」』）]*")
_CUTS = (_SENTENCE, re.compile(r"\n"), re.compile(r"\s+"))


def _pieces(text: str, places: re.Pattern[str]) -> list[str]:
    """The text cut after every place; together they are the text."""
    ends = [match.end() for match in places.finditer(text)]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True) if end > start]


def _pack(pieces: list[str], longest: int, length: Callable[[str], int]) -> Iterator[str]:
    """Neighbours together up to the longest length; a piece that is longer stays alone."""
    group: list[str] = []
    size = 0
    for piece in pieces:
        added = length(piece)
        if group and size + added > longest:
            yield "".join(group)
            group, size = [], 0
        group.append(piece)
        size += added
    if group:
        yield "".join(group)


def _shorten(
    block: str, longest: int, length: Callable[[str], int], cuts: tuple[re.Pattern[str], ...]
) -> Iterator[str]:
    """A block in parts of at most WHOLE times the longest length."""
    if length(block) <= WHOLE * longest:
        yield block
        return
    if not cuts:  # no character is shorter than 1
        yield from (block[place : place + longest] for place in range(0, len(block), longest))
        return
    for part in _pack(_pieces(block, cuts[0]), longest, length):
        yield from _shorten(part, longest, length, cuts[1:])


CHARACTERS_PER_TOKEN = 4.0  # of alphabets
TOKENS_PER_IDEOGRAPH = 0.55  # of Han, kana and Hangul
_IDEOGRAPHS = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has, without a tokenizer, which may be trained on these very documents.

    Against the 128k DeepSeek tokenizer it is within a quarter on prose and code (tests/data_pipeline/test_chunk.py).
    """
    ideographs = len(_IDEOGRAPHS.findall(text))
    return max(1, round((len(text) - ideographs) / CHARACTERS_PER_TOKEN + ideographs * TOKENS_PER_IDEOGRAPH))


def chunks(text: str, longest: int, length: Callable[[str], int] = len) -> Iterator[str]:
    """The chunks of a text; joined they are the text, but for white space where it was cut.

    `length` says how long a piece is (characters, or tokens); its sum over pieces stands for the whole. Chunks are at
    most `longest`, single blocks up to 1.25 times that. A text without anything but white space has none.
    """
    blocks = [
        part for block in _pieces(text, _BLOCKS) for part in _shorten(block, longest, length, _CUTS) if part.strip()
    ]
    for chunk in _pack(blocks, longest, length):
        yield chunk.strip("\n")
