"""Blends give each source its exact share, in every prefix, and a change of blend loses and repeats nothing."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_joy.data.blend import CYCLE_LIMIT, Blend, BlendSegment, cycle_counts, interleave
from megatron_joy.errors import UserError

WEIGHTS = st.dictionaries(
    st.sampled_from("abcdefgh"), st.integers(1, 400).map(lambda n: n / 100), min_size=1, max_size=8
)


def test_decimal_weights_are_met_exactly() -> None:
    assert cycle_counts({"a": 0.7, "b": 0.3}) == [7, 3]
    assert cycle_counts({"a": 1.0}) == [1]
    assert cycle_counts({"a": 2.0, "b": 4.0}) == [1, 2]
    assert cycle_counts({"a": 0.55, "b": 0.25, "c": 0.2}) == [11, 5, 4]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12))
def test_other_weights_are_met_to_one_slot_of_the_cycle(weights: list[float]) -> None:
    counts = cycle_counts({str(i): weight for i, weight in enumerate(weights)})
    assert sum(counts) <= CYCLE_LIMIT
    shares = [Fraction(repr(weight)) / sum(Fraction(repr(w)) for w in weights) for weight in weights]
    for count, share in zip(counts, shares, strict=True):
        assert abs(Fraction(count, sum(counts)) - share) < Fraction(1, CYCLE_LIMIT)


def test_a_source_too_rare_for_the_cycle_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"source rare has weight 1e-07 of 1.*less than one sample in 100000"):
        cycle_counts({"common": 1.0, "rare": 1e-7})


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_every_prefix_has_each_share_to_within_one_sample(counts: list[int]) -> None:
    order, slots = interleave(counts), sum(counts)
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    for source, count in enumerate(counts):
        had = np.cumsum(order == source)
        due = np.arange(1, slots + 1) * count / slots
        assert np.abs(had - due).max() < 1


def brute_force(segments: list[BlendSegment], samples: int) -> list[tuple[str, int]]:
    """The blend by counting, one sample after another."""
    read: Counter[str] = Counter()
    places = []
    for number, segment in enumerate(segments):
        end = segments[number + 1].start if number + 1 < len(segments) else samples
        names = list(segment.weights)
        slots = interleave(cycle_counts(segment.weights))
        for k in range(segment.start, min(end, samples)):
            name = names[slots[(k - segment.start) % len(slots)]]
            places.append((name, read[name]))
            read[name] += 1
    return places


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, WEIGHTS, WEIGHTS, st.integers(1, 300), st.integers(1, 300))
def test_changing_the_blend_in_mid_run_loses_and_repeats_nothing(
    first: dict[str, float], second: dict[str, float], third: dict[str, float], change: int, later: int
) -> None:
    segments = [BlendSegment(0, first), BlendSegment(change, second), BlendSegment(change + later, third)]
    blend, samples = Blend(segments), change + later + 200
    places = [blend.locate(k) for k in range(samples)]
    assert places == brute_force(segments, samples)
    for name in {name for name, _ in places}:
        readings = [reading for source, reading in places if source == name]
        assert readings == list(range(len(readings)))
    assert [blend.sample_of(*place) for place in places] == list(range(samples))
    for k in (0, 1, change, change + 1, change + later, samples):
        counted = Counter(name for name, _ in places[:k])
        assert {name: n for name, n in blend.readings_before(k).items() if n} == counted


def test_what_was_drawn_before_a_change_does_not_depend_on_it() -> None:
    before = Blend([BlendSegment(0, {"a": 0.5, "b": 0.5})])
    after = Blend([BlendSegment(0, {"a": 0.5, "b": 0.5}), BlendSegment(101, {"a": 0.1, "c": 0.9})])
    assert [before.locate(k) for k in range(101)] == [after.locate(k) for k in range(101)]
    assert after.sample_of("b", 10**6) is None
    assert after.sample_of("c", 0) is not None


def test_a_sample_trillions_on_costs_no_more() -> None:
    blend = Blend([BlendSegment(0, {"a": 0.123, "b": 0.456, "c": 0.421})])
    k = 10**15 + 12_345
    name, reading = blend.locate(k)
    assert blend.sample_of(name, reading) == k
    assert abs(reading - k * {"a": 0.123, "b": 0.456, "c": 0.421}[name]) < 2


def test_segments_out_of_order_are_refused() -> None:
    for starts in ([], [1], [0, 5, 5], [0, 9, 3]):
        with pytest.raises(ValueError, match="segments start at"):
            Blend([BlendSegment(start, {"a": 1.0}) for start in starts])
    with pytest.raises(IndexError):
        Blend([BlendSegment(0, {"a": 1.0})]).locate(-1)
