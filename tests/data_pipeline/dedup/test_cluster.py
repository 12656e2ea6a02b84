"""Near-duplicates are found out of core as a plain search over all pairs does, and one of each cluster is kept."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.dedup import store as stores
from data_pipeline.dedup.bands import band_key, candidate_probability
from data_pipeline.dedup.cluster import find_clusters
from data_pipeline.dedup.external import Rows, RowSorter, group_starts, rows_of
from data_pipeline.dedup.match import NEIGHBOURS, Settings, match_band
from data_pipeline.dedup.minhash import MinHash, Numbers
from data_pipeline.dedup.store import Store, open_part, write_part
from data_pipeline.dedup.verify import distinct_pairs, exact_jaccard, near_pairs
from megatron_joy.errors import UserError

METHOD = MinHash()
Scored = tuple[str, float]


def text(rng: random.Random, words: int) -> list[str]:
    return [f"w{rng.randrange(50_000)}" for _ in range(words)]


def edited(rng: random.Random, words: list[str], similarity: float) -> list[str]:
    """The words with so many of them changed, far apart, that 7-gram sets have about this Jaccard similarity."""
    changes = max(1, round(len(words) * (1 - similarity) / (7 * (1 + similarity))))
    found = list(words)
    for place in rng.sample(range(3, len(words) - 3, 7), changes):
        found[place] = f"zq{rng.randrange(10**6)}"
    return found


def plain_jaccard(one: str, other: str) -> float:
    sets = [{tuple(words[i : i + 7]) for i in range(len(words) - 6)} for words in (one.split(), other.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def store_of(folder: Path, *parts: Sequence[Scored], existing: int = 0) -> Store:
    places = [folder / f"part{number}" for number in range(len(parts))]
    for place, documents in zip(places, parts, strict=True):
        write_part(place, METHOD, [(content.encode(), score) for content, score in documents])
    return Store(places, METHOD, existing)


def candidates_of(store: Store, folder: Path, settings: Settings = Settings()) -> Numbers:  # noqa: B008 (frozen)
    """Every pair that agrees in a band, once."""
    bands: list[Rows] = []
    for band in range(settings.bands):
        blocks = list(match_band(store, band, settings, folder / "scratch"))
        bands.append(np.concatenate([*blocks, np.zeros((0, 2), np.uint64)]))
    blocks = list(distinct_pairs(bands, settings.memory_rows))
    return np.concatenate([*blocks, np.zeros((0, 2), np.int64)])


def clusters_of(
    store: Store,
    folder: Path,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
) -> tuple[list[list[int]], Counter[int]]:
    """[document that goes, document that stays for it], ascending, and the clusters' sizes."""
    pairs = near_pairs(store, candidates_of(store, folder, settings), settings.threshold)
    sizes: Counter[int] = Counter()
    pieces = np.array_split(pairs, 3)  # however they come
    blocks = find_clusters(store, pieces, folder / "scratch", sizes, settings.memory_rows)
    return sorted(pair for block in blocks for pair in block.tolist()), sizes


def dropped(store: Store, folder: Path, settings: Settings = Settings()) -> list[list[int]]:  # noqa: B008 (frozen)
    return clusters_of(store, folder, settings)[0]


@pytest.fixture(scope="module")
def planted() -> tuple[list[str], list[tuple[int, int, float]]]:
    """Documents, and the pairs planted in them with their exact similarity by plain Python."""
    rng = random.Random(11)
    documents = [text(rng, rng.randrange(150, 900)) for _ in range(200)]
    pairs = []
    for target in (0.8, 0.85, 0.9, 0.95):
        for origin in range(200):
            documents.append(edited(rng, documents[origin], target + rng.uniform(-0.02, 0.02)))
            pairs.append((origin, len(documents) - 1))
    joined = [" ".join(words) for words in documents]
    return joined, [(i, j, plain_jaccard(joined[i], joined[j])) for i, j in pairs]


def test_planted_pairs_are_found_with_recall_099_and_precision_1(
    tmp_path: Path, planted: tuple[list[str], list[tuple[int, int, float]]]
) -> None:
    documents, pairs = planted
    store = store_of(tmp_path, [(document, 0.0) for document in documents])
    candidates = candidates_of(store, tmp_path)
    similar = candidates[exact_jaccard(store, candidates) >= 0.9]
    found = set(map(tuple, similar.tolist()))
    wanted = {(i, j) for i, j, similarity in pairs if similarity >= 0.9}
    assert len(wanted) > 200
    assert len(found & wanted) / len(wanted) >= 0.99
    assert all(plain_jaccard(documents[i], documents[j]) >= 0.9 for i, j in found)


def test_exact_similarity_equals_plain_sets(
    tmp_path: Path, planted: tuple[list[str], list[tuple[int, int, float]]]
) -> None:
    documents, pairs = planted
    store = store_of(tmp_path, [(document, 0.0) for document in documents])
    found = exact_jaccard(store, np.array([[i, j] for i, j, _ in pairs]))
    assert found.tolist() == [similarity for _, _, similarity in pairs]


def test_little_memory_and_several_parts_give_the_same_clusters(
    tmp_path: Path, planted: tuple[list[str], list[tuple[int, int, float]]]
) -> None:
    scored = [(document, 0.0) for document in planted[0]]
    whole = dropped(store_of(tmp_path / "one", scored), tmp_path)
    store = store_of(tmp_path / "many", scored[:100], [], scored[100:101], scored[101:])
    assert len(whole) > 200
    assert dropped(store, tmp_path, Settings(memory_rows=500)) == whole
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_store_opens_few_parts_at_a_time_and_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: tuple[list[str], list[tuple[int, int, float]]]
) -> None:
    scored = [(document, 0.0) for document in planted[0][:200] + planted[0][800:]]
    parts = [scored[start : start + 20] for start in range(0, 400, 20)]
    whole = dropped(store_of(tmp_path / "all", *parts), tmp_path)
    monkeypatch.setattr(stores, "OPEN_PARTS", 2)
    store = store_of(tmp_path / "few", *parts)
    assert len(whole) > 50
    assert dropped(store, tmp_path) == whole
    assert store.part.cache_info().currsize == 2
    again = Store([tmp_path / "few" / f"part{number}" for number in range(20)], METHOD, 0, store.offsets)
    assert again.part.cache_info().currsize == 0  # whoever knows the offsets opens nothing before it is asked for
    numbers = np.array([0, 19, 20, 399])
    assert np.array_equal(again.set_sizes(numbers), store.set_sizes(numbers))


def test_a_chain_is_one_cluster_and_its_best_scored_document_is_kept(tmp_path: Path) -> None:
    rng = random.Random(2)
    chain = [text(rng, 700)]
    for _ in range(3):
        chain.append(edited(rng, chain[-1], 0.95))
    other = " ".join(text(rng, 700))
    joined = [" ".join(words) for words in chain]
    assert plain_jaccard(joined[0], joined[3]) < 0.9 <= plain_jaccard(joined[0], joined[1])
    documents = [(joined[0], 0.1), (other, 0.9), (joined[1], 0.2), (joined[2], 0.8), (joined[3], 0.3)]
    gone, sizes = clusters_of(store_of(tmp_path, documents), tmp_path)
    assert gone == [[0, 3], [2, 3], [4, 3]]
    assert dict(sizes) == {4: 1}


def test_of_equal_scores_the_longest_and_of_those_the_first_is_kept(tmp_path: Path) -> None:
    words = " ".join(text(random.Random(3), 400))
    assert dropped(store_of(tmp_path / "a", [(words, 0.0), (words + " !!!", 0.0), (words, 0.0)]), tmp_path) == [
        [0, 1],
        [2, 1],
    ]
    assert dropped(store_of(tmp_path / "b", [(words, 0.0), (words, 0.0)]), tmp_path) == [[1, 0]]


def test_documents_of_an_existing_store_are_never_dropped_and_win(tmp_path: Path) -> None:
    rng = random.Random(5)
    first, second = text(rng, 500), text(rng, 500)
    old = [(" ".join(first), 0.0), (" ".join(edited(rng, first, 0.97)), 0.0)]
    new = [(" ".join(edited(rng, first, 0.97)) + " longer", 9.0), (" ".join(second), 0.0), (" ".join(second), 0.0)]
    store = store_of(tmp_path, old, new, existing=1)
    longest = max((0, 1), key=lambda number: len(old[number][0]))
    assert dropped(store, tmp_path) == [[2, longest], [4, 3]]


def test_a_large_bucket_is_one_cluster_in_linear_work(tmp_path: Path) -> None:
    rng = random.Random(6)
    words = text(rng, 300)
    copies = [(" ".join(words) + "." * number, 0.0) for number in range(5 * NEIGHBOURS)]
    store = store_of(tmp_path, copies)
    assert len(dropped(store, tmp_path)) == len(copies) - 1
    assert len(copies) < len(candidates_of(store, tmp_path)) <= len(copies) * (NEIGHBOURS + 1)


def test_documents_without_words_are_no_duplicates(tmp_path: Path) -> None:
    assert dropped(store_of(tmp_path, [("...", 0.0), ("...", 0.0), ("", 0.0)]), tmp_path) == []


def test_an_empty_store_has_no_clusters(tmp_path: Path) -> None:
    assert dropped(store_of(tmp_path, []), tmp_path) == []


def test_bands_find_candidates_as_often_as_their_curve_says() -> None:
    rng = np.random.default_rng(4)
    for similarity in (0.7, 0.8, 0.85):
        left = rng.integers(0, 2**32, (4000, 128), dtype=np.uint32)
        right = np.where(rng.random(left.shape) < similarity, left, left + np.uint32(1))
        agree = [band_key(left, 16, band) == band_key(right, 16, band) for band in range(16)]
        share = np.any(agree, axis=0).mean()
        expected = candidate_probability(similarity, 16, 8)
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000)


@pytest.mark.parametrize("memory_rows", [1, 7, 64, 10_000])
def test_external_sorting_equals_a_stable_sort_and_keeps_groups_whole(tmp_path: Path, memory_rows: int) -> None:
    rng = np.random.default_rng(memory_rows)
    keys = rng.choice(np.array([0, 1, 5, 2**40, 2**64 - 1, 77], dtype=np.uint64), 300)
    keys[::3] = rng.integers(0, 2**64, 100, dtype=np.uint64)
    rows = rows_of(keys, np.arange(300))
    sorter = RowSorter(tmp_path / "runs", memory_rows)
    for start in range(0, 300, 41):
        sorter.add(rows[start : start + 41])
    blocks = list(sorter.blocks())
    assert np.array_equal(np.concatenate(blocks), rows[np.argsort(keys, kind="stable")])
    ends = [set(block[:, 0].tolist()) for block in blocks]
    assert all(not one & other for one, other in combinations(ends, 2))
    assert not (tmp_path / "runs").exists()


def test_group_starts() -> None:
    assert group_starts(np.array([3, 3, 4, 9, 9, 9], dtype=np.uint64)).tolist() == [0, 2, 3, 6]
    assert group_starts(np.zeros(0, dtype=np.uint64)).tolist() == [0]


def test_a_part_of_another_method_or_a_torn_one_is_refused(tmp_path: Path) -> None:
    write_part(tmp_path / "part", METHOD, [(b"some words", 0.0)])
    with pytest.raises(UserError, match="made with other shingles"):
        open_part(tmp_path / "part", MinHash(gram=5))
    (tmp_path / "part" / "documents.bin").write_bytes(b"")
    with pytest.raises(UserError, match="0 bytes, expected 16"):
        open_part(tmp_path / "part", METHOD)
    with pytest.raises(UserError, match="no whole signature part"):
        open_part(tmp_path / "elsewhere", METHOD)
