"""Ranges of flattened tensors as boxes, against numpy's own indexing."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_joy.checkpoint.boxes import Piece, boxes_of_range, flat_boxes

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(shapes)
    count = math.prod(shape)
    start = draw(st.integers(0, count))
    return shape, start, draw(st.integers(start, count))


@settings(deadline=None)
@given(ranges())
def test_a_flat_range_is_cut_into_boxes_that_hold_its_elements_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, end = case
    places = np.arange(math.prod(shape)).reshape(shape)
    boxes = flat_boxes(shape, start, end)
    found = [places[tuple(map(slice, low, high))].ravel() for low, high in boxes]
    assert np.array_equal(np.concatenate([*found, np.array([], int)]), np.arange(start, end))


@settings(deadline=None)
@given(ranges())
def test_a_flat_range_of_n_dimensions_is_at_most_2n_minus_1_boxes(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, end = case
    assert len(flat_boxes(shape, start, end)) <= 2 * len(shape) - 1


@settings(deadline=None)
@given(ranges(), st.data())
def test_the_boxes_of_pieces_put_each_element_where_the_piece_lies_in_the_global_tensor(
    case: tuple[tuple[int, ...], int, int], data: st.DataObject
) -> None:
    """A parameter of two pieces, as gate and up in one matrix, that lie apart in the global tensor."""
    shape, start, end = case
    axis = data.draw(st.integers(0, len(shape) - 1))
    cut = data.draw(st.integers(0, shape[axis]))
    added = data.draw(st.integers(0, 1))
    gap = 3
    wide = (*(2 for _ in range(added)), *(n + (gap if i == axis else 0) for i, n in enumerate(shape)))
    flat = torch.arange(start, end, dtype=torch.float32)
    whole = np.full(wide, -1.0)
    for first, last, shift in ((0, cut, 0), (cut, shape[axis], gap)):
        low = tuple(first if i == axis else 0 for i in range(len(shape)))
        size = tuple(last - first if i == axis else n for i, n in enumerate(shape))
        offset = (*(1 for _ in range(added)), *(n + (shift if i == axis else 0) for i, n in enumerate(low)))
        for box in boxes_of_range(Piece("key", wide, offset, low, size, (0, 0, 0)), shape, start, end, flat):
            place = tuple(slice(o, o + n) for o, n in zip(box.offset, box.data.shape, strict=True))
            assert (whole[place] == -1).all()
            whole[place] = box.data.numpy()
    expected = np.full(wide, -1.0)
    places = np.arange(math.prod(shape)).reshape(shape)
    for index in np.ndindex(*shape):
        if start <= places[index] < end:
            moved = tuple(n + (gap if i == axis and n >= cut else 0) for i, n in enumerate(index))
            expected[(*(1 for _ in range(added)), *moved)] = places[index]
    assert np.array_equal(whole, expected)


def test_boxes_are_views_so_that_loading_fills_the_parameter_itself() -> None:
    flat = torch.zeros(10)
    piece = Piece("key", (4, 4), (0, 0), (0, 0), (4, 4), (0, 0, 0))
    for box in boxes_of_range(piece, (4, 4), 3, 13, flat):
        box.data.fill_(1.0)
    assert flat.eq(1.0).all()
