"""Shares of a buffer hold whole matrices, cost about the same, and are the same wherever they are worked out."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_joy.parallel.placement import ALIGNED, Item, Placement, place

DIVISOR = 128


def item(count: int, rows: int, columns: int, splittable: bool = False) -> Item:
    small, large = sorted((rows, columns))
    return Item(count, rows * columns, count * (2 * small * small * large + small**3), splittable)


def check(items: list[Item], shards: int, placed: Placement) -> None:
    """No overlap, all aligned, inside the buffer, no share ends inside a matrix or a pair that it could hold."""
    spans = sorted((start, start + i.elements) for start, i in zip(placed.starts, items, strict=True))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= shards * placed.share and placed.share % DIVISOR == 0
    for start, one in zip(placed.starts, items, strict=True):
        assert start % ALIGNED == 0
        unit = one.size if one.splittable or one.elements > placed.share else one.elements
        for border in range(placed.share, shards * placed.share, placed.share):
            if start < border < start + one.elements:
                assert (border - start) % unit == 0


small = st.integers(1, 40)
whole = st.one_of(
    st.builds(item, st.integers(1, 2), small, small),
    st.builds(item, st.just(2), st.sampled_from([16, 64, 160]), st.just(64)),  # pairs that a share may end between
)
experts = st.sampled_from([8, 16, 24]).flatmap(
    lambda width: st.lists(
        st.builds(item, st.sampled_from([4, 8]), st.just(16), st.just(width), st.just(True)), max_size=4
    )
)


@settings(max_examples=60, deadline=None)
@given(st.lists(whole, max_size=12), experts, st.integers(1, 7))
def test_no_share_ends_inside_a_matrix(dense: list[Item], stacked: list[Item], shards: int) -> None:
    items = dense + stacked
    if items:
        placed = place(tuple(items), shards, DIVISOR)
        check(items, shards, placed)
        assert place.__wrapped__(tuple(items), shards, DIVISOR) == placed


LAYER = [item(1, 1536, 2048), item(1, 576, 2048), item(1, 6144, 1536), item(1, 8192, 512), item(1, 2048, 4096)]
SHARED = [item(2, 768, 2048), item(1, 2048, 768)]
STAGE = (LAYER + SHARED) * 20  # half of the 48B's dense matrices
STAGES_EXPERTS = [item(64, 768, 2048, True), item(32, 2048, 768, True)] * 20  # EP 8: 32 experts of each layer


@pytest.mark.parametrize("shards", [8, 16, 32])
def test_the_48bs_dense_matrices_are_balanced_by_cost(shards: int) -> None:
    placed = place(tuple(STAGE), shards, DIVISOR)
    check(STAGE, shards, placed)
    mean = sum(i.cost for i in STAGE) / shards
    assert max(placed.costs) < 1.25 * mean
    assert shards * placed.share < 1.25 * sum(i.elements for i in STAGE)


# The first stage's dense layer: gate and up together are longer than an even share of 32 ranks or more.
DENSE = [item(2, 7168, 2048), item(1, 2048, 7168)]


@pytest.mark.parametrize(("shards", "padding"), [(16, 1.06), (32, 1.1), (64, 1.45)])
def test_gate_and_up_lie_in_two_shares_where_one_would_be_too_long(shards: int, padding: float) -> None:
    items = STAGE + DENSE
    placed = place(tuple(items), shards, DIVISOR)
    check(items, shards, placed)
    assert shards * placed.share < padding * sum(i.elements for i in items)
    dearest = max(DENSE[0].cost / 2, 1.1 * sum(i.cost for i in items) / shards)
    assert max(placed.costs) <= dearest


@pytest.mark.parametrize("shards", [1, 4, 60])
def test_the_48bs_experts_are_shared_out_between_matrices(shards: int) -> None:
    placed = place(tuple(STAGES_EXPERTS), shards, DIVISOR)
    check(STAGES_EXPERTS, shards, placed)
    assert max(placed.costs) < 1.1 * sum(i.cost for i in STAGES_EXPERTS) / shards
    assert shards * placed.share < 1.1 * sum(i.elements for i in STAGES_EXPERTS)
