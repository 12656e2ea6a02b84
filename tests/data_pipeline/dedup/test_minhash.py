"""Signatures equal the slow reference on any text, and estimate the Jaccard similarity as the theory says."""

import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.dedup.minhash import EMPTY, MinHash, agreement, jaccard_of_rows
from data_pipeline.dedup.words import ALONE, IGNORED, KIND_SHIFT, POINTS, SEQUENCE, WORD, WORDS_A_BYTE, folding
from tests.data_pipeline.dedup import slow_minhash

TEXTS = [
    "",
    " \n\t",
    "one",
    "one two three four five six",
    "The quick brown Fox jumps over the lazy dog, and THE QUICK BROWN FOX jumps again.",
    "大规模语言模型的预训练数据需要去重。模型很大, JoyAI 很好。",
    "Größe STRASSE Straße ﬁne ①② ½ x² Ａｂｃ",
    "e\u0301te\u0301 \u00e9t\u00e9 na\u00efve soft\u00adhyphen zero\u200bwidth ❤\ufe0f",
    "ภาษาไทยไม่มีช่องว่าง 한국어는 띄어쓰기가 있다 ひらがなカタカナ हिन्दी में शब्द عربي",
    "tag\U000e0020ged \u845b\U000e0100 flag\U0001f3f4\U000e0067\U000e007f end\U0010ffff",
    "\u0000\u0001 a\u0000b \U0001f600 \U00030000\U0002a6d6 \U000e0001 \uffff _under_score_ 3.14",
    "word " * 3000,
]


def slow(texts: list[str], method: MinHash) -> np.ndarray:
    rows = [slow_minhash.signature(text, method.gram, method.permutations, method.seed) for text in texts]
    return np.array(rows, dtype=np.uint32)


@pytest.mark.parametrize(("gram", "permutations"), [(7, 128), (1, 16), (3, 40)])
def test_signatures_and_shingles_equal_the_slow_reference(gram: int, permutations: int) -> None:
    method = MinHash(gram, permutations, seed=5)
    found, sets, ends = method.sign([text.encode() for text in TEXTS])
    assert np.array_equal(found, slow(TEXTS, method))
    expected = [sorted(set(slow_minhash.shingles(text, gram))) for text in TEXTS]
    assert [part.tolist() for part in np.split(sets, ends)] == [*expected, []]
    assert [method.shingles(text.encode()).tolist() for text in TEXTS] == expected
    assert [len(method.all_shingles(text.encode())) for text in TEXTS] == [
        len(slow_minhash.shingles(text, gram)) for text in TEXTS
    ]


@pytest.mark.parametrize("words", [10, 33, 300, 9000, 300_000])
def test_sets_of_any_size_are_ascending_and_distinct(words: int) -> None:
    method = MinHash(gram=1)
    numbers = np.random.default_rng(words).integers(0, words, 2 * words)
    text = " ".join(map(str, numbers)).encode()
    _, sets, ends = method.sign([text, b"", text])
    expected = np.unique(method.all_shingles(text))
    assert np.array_equal(sets, np.concatenate([expected, expected]))
    assert ends.tolist() == [len(expected), len(expected), 2 * len(expected)]


@settings(max_examples=150, deadline=None)
@example(["0\U000e00200"])  # a tag inside a word
@given(st.lists(st.text(max_size=60), max_size=4))
def test_any_text_equals_the_slow_reference(texts: list[str]) -> None:
    method = MinHash(gram=3, permutations=8)
    found, _, _ = method.sign([text.encode() for text in texts])
    assert np.array_equal(found, slow(texts, method).reshape(-1, 8))


def test_every_code_point_is_of_the_kind_that_it_is_said_to_be() -> None:
    # 200 words of one code point each, marked off by a letter: any wrong kind or folding changes the shingles.
    method = MinHash(gram=1)
    points = [point for point in range(0x31000) if not 0xD800 <= point < 0xE000]
    points = points[::3] + points[0x2000:0x3200] + list(range(0x3FFF0, 0x40010)) + list(range(0xDFFF0, 0xE1010))
    for start in range(0, len(points), 200):
        text = " ".join(f"a{chr(point)}b{point}" for point in points[start : start + 200])
        assert method.shingles(text.encode()).tolist() == sorted(set(slow_minhash.shingles(text, 1))), start


def test_no_code_point_folds_to_more_words_than_kernels_have_room_for() -> None:
    pool = folding().pool.tolist()
    for point, entry in enumerate(folding().table.tolist()):
        if entry >> KIND_SHIFT != SEQUENCE:
            continue
        place = entry & (1 << KIND_SHIFT) - 1
        parts = [part >> KIND_SHIFT for part in pool[place + 1 : place + 1 + pool[place]]]
        kinds = [kind for kind in parts if kind != IGNORED]
        begun = sum(kind == WORD and before != WORD for before, kind in zip([None, *kinds], kinds, strict=False))
        assert kinds.count(ALONE) + begun <= WORDS_A_BYTE * len(chr(point).encode()), hex(point)
        assert len(parts) <= 18, hex(point)  # MOST_PARTS of native/folding.h
    assert len(folding().table) == POINTS


def test_a_text_of_characters_that_are_many_words_is_signed() -> None:
    method = MinHash(gram=3, permutations=8)
    text = "㌖" * 5000  # 15,000 bytes, 30,000 words
    assert method.all_shingles(text.encode()).tolist() == slow_minhash.shingles(text, 3)
    assert np.array_equal(method.sign([text.encode()] * 3)[0], slow([text] * 3, method))


def test_case_width_and_composition_make_no_difference() -> None:
    method = MinHash()
    plain = "Caf\u00e9 Stra\u00dfe costs 12 and ABC of \u30ac today"
    other = "cafe\u0301 STRASSE costs １２ and ａｂｃ of \u30ab\u3099 ToDay"
    assert unicodedata.normalize("NFC", plain) != unicodedata.normalize("NFC", other)
    first, second = method.sign([plain.encode(), other.encode()])[0]
    assert np.array_equal(first, second)


def test_chinese_is_shingled_by_character() -> None:
    assert len(MinHash().shingles("预训练数据需要去除重复".encode())) == 11 - 7 + 1


def test_a_text_without_words_has_no_shingles_and_equals_nothing() -> None:
    method = MinHash()
    found, sets, ends = method.sign([b"", b"?! --"])
    assert (found == EMPTY).all()
    assert (len(sets), ends.tolist()) == (0, [0, 0])
    assert len(method.shingles(b"?!")) == 0
    empty = jaccard_of_rows(np.zeros(0, np.uint64), np.zeros(3, np.int64), np.array([0]), np.array([1]))
    assert empty.tolist() == [0.0]


def overlapping(rng: np.random.Generator, similarity: float, words: int) -> tuple[bytes, bytes, float]:
    """Two texts whose sets of single words have about this similarity, and that similarity exactly."""
    shared = round(2 * words * similarity / (1 + similarity))
    numbers = rng.choice(10**9, 2 * words - shared, replace=False)
    left, right = numbers[:words], numbers[words - shared :]
    exact = len(set(left) & set(right)) / len(set(left) | set(right))
    return " ".join(map(str, left)).encode(), " ".join(map(str, right)).encode(), exact


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8, 0.9])
def test_equal_entries_estimate_the_jaccard_similarity(similarity: float) -> None:
    rng = np.random.default_rng(7)
    method = MinHash(gram=1)
    pairs = [overlapping(rng, similarity, 300) for _ in range(400)]
    signatures, _, _ = method.sign([text for left, right, _ in pairs for text in (left, right)])
    error = agreement(signatures[::2], signatures[1::2]) - np.array([exact for _, _, exact in pairs])
    deviation = np.sqrt(similarity * (1 - similarity) / 128)
    assert abs(error.mean()) < 4 * deviation / np.sqrt(len(pairs))
    assert 0.85 * deviation < error.std() < 1.15 * deviation


def test_jaccard_of_rows_is_exact() -> None:
    rng = np.random.default_rng(3)
    sets = [np.unique(rng.integers(0, 60, size, dtype=np.uint64)) for size in (0, 1, 30, 50, 50, 80)]
    starts = np.cumsum([0, *map(len, sets)]).astype(np.int64)
    left, right = (index.astype(np.int64) for index in np.triu_indices(len(sets), 1))
    found = jaccard_of_rows(np.concatenate(sets), starts, left, right)
    for i, j, value in zip(left, right, found, strict=True):
        one, two = set(sets[i].tolist()), set(sets[j].tolist())
        assert value == (len(one & two) / len(one | two) if one | two else 0.0)


def test_what_signatures_depend_on_is_in_the_fingerprint() -> None:
    methods = [MinHash(), MinHash(gram=5), MinHash(permutations=64), MinHash(seed=2)]
    assert len({method.fingerprint for method in methods}) == 4
    assert MinHash().fingerprint == MinHash().fingerprint


@pytest.mark.parametrize("gram", [0, 65])
def test_shingles_that_the_kernel_has_no_room_for_are_refused(gram: int) -> None:
    assert len(MinHash(gram=64).all_shingles(b"w " * 70)) == 70 - 64 + 1
    with pytest.raises(ValueError, match=f"gram = {gram}: a shingle has 1 to 64 words"):
        MinHash(gram=gram)
