"""The permutation is a permutation, its inverse undoes it, it looks random, and it never changes."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_joy.data.order import LARGEST_SIZE, Permutation, SourceOrder, round_keys

SIZES = st.integers(1, 3000)
LARGE_SIZES = st.integers(1, LARGEST_SIZE)
SEEDS = st.integers(0, 2**63 - 1)

# (size, seed, epoch) -> values at some positions. A change here changes the sample order of every run there is.
GOLDEN = {
    (10, 1234, 0): [0, 1, 8, 6, 9, 3, 4, 2, 7, 5],
    (4_882_812_499, 1234, 3): [
        64248434,
        2283796526,
        1430288127,
        743229745,
        1213892345,
        2478221528,
        210210853,
        3970401773,
        3597671774,
        2985310153,
    ],
}


@settings(deadline=None, max_examples=80)
@given(SIZES, SEEDS)
def test_every_size_is_permuted_without_gap_or_repeat(size: int, seed: int) -> None:
    values = Permutation(size, round_keys(seed, "source", 0)).many(np.arange(size))
    assert np.array_equal(np.sort(values), np.arange(size))


@settings(deadline=None, max_examples=200)
@given(LARGE_SIZES, SEEDS, st.data())
def test_inverse_undoes_the_permutation_up_to_2_to_the_62(size: int, seed: int, data: st.DataObject) -> None:
    permutation = Permutation(size, round_keys(seed))
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    values = permutation.many(np.array(positions))
    assert values.min() >= 0 and values.max() < size
    assert permutation.inverse_many(values).tolist() == positions
    assert [permutation[position] for position in positions] == values.tolist()
    assert [permutation.inverse(int(value)) for value in values] == positions


def test_what_is_outside_is_refused() -> None:
    permutation = Permutation(5, round_keys(0))
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            permutation[outside]
        with pytest.raises(IndexError):
            permutation.inverse(outside)
        with pytest.raises(IndexError):
            permutation.many(np.array([0, outside]))
    for size in (0, LARGEST_SIZE + 1):
        with pytest.raises(ValueError):
            Permutation(size, round_keys(0))


@pytest.mark.parametrize("size", [3, 5, 8, 12, 33])
def test_over_keys_every_value_is_as_likely_at_every_position(size: int) -> None:
    draws = 2000
    table = np.zeros((size, size))
    for key in range(draws):
        table[np.arange(size), Permutation(size, round_keys(key)).many(np.arange(size))] += 1
    # Chi-square of a random permutation matrix sum has (size - 1)^2 degrees of freedom after scaling by size/(size-1).
    chi_square = ((table - draws / size) ** 2 / (draws / size)).sum() * (size - 1) / size
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [100_000, 1 << 17, (1 << 17) + 1])
def test_long_orders_look_random(size: int) -> None:
    values = Permutation(size, round_keys(11, "x", 0)).many(np.arange(size)).astype(float)
    # Each tenth of the positions holds each tenth of the values equally often.
    cells = np.histogram2d(np.arange(size), values, bins=10)[0]
    chi_square = ((cells - size / 100) ** 2 / (size / 100)).sum()
    assert abs(chi_square - 81) < 5 * np.sqrt(2 * 81)
    # Neighbours have nothing to do with each other, at any small distance.
    for lag in (1, 2, 3, 8, 256):
        correlation = np.corrcoef(values[:-lag], values[lag:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(size)
    # Nor are the steps between them of few sizes, as those of x -> a x + b are.
    assert len(np.unique(np.diff(values))) > 0.5 * size
    # A random permutation has one fixed point on average, and its cycles are few.
    assert (values == np.arange(size)).sum() < 10


def test_epochs_sources_and_seeds_have_orders_of_their_own() -> None:
    size = 1000
    parts = [(1, "a", 0), (1, "a", 1), (1, "b", 0), (2, "a", 0), (12, "a", 0), (1, "2a", 0)]
    orders = [Permutation(size, round_keys(*part)).many(np.arange(size)) for part in parts]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).sum() < 15


def test_parts_of_a_key_do_not_run_into_each_other() -> None:
    assert round_keys("ab", "c") != round_keys("a", "bc")
    assert round_keys(1, 23) != round_keys(12, 3)


@pytest.mark.parametrize(("size", "seed", "epoch"), list(GOLDEN))
def test_the_order_is_the_one_of_all_earlier_versions(size: int, seed: int, epoch: int) -> None:
    permutation = Permutation(size, round_keys(seed, "golden", epoch))
    assert [permutation[position] for position in range(10)] == GOLDEN[size, seed, epoch]


def test_another_process_gets_the_same_order() -> None:
    program = (
        "from megatron_joy.data.order import *; p = Permutation(1000003, round_keys(5, 'x', 2));"
        "print([p[i] for i in range(50)])"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                       capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    permutation = Permutation(1000003, round_keys(5, "x", 2))
    assert outputs == {f"{[permutation[i] for i in range(50)]}\n"}


def test_a_source_is_read_once_an_epoch_in_a_new_order() -> None:
    order = SourceOrder(3, "fingerprint", 50)
    readings = [order.sample_at(reading) for reading in range(150)]
    for epoch in range(3):
        assert {index for e, index in readings[epoch * 50 : epoch * 50 + 50] if e == epoch} == set(range(50))
    assert readings[:50] != [(0, index) for _, index in readings[50:100]]
    assert [order.reading_of(*place) for place in readings] == list(range(150))
