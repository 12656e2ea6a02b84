"""The kernels: a missing library is one clear line; counting and union-find equal the plain way."""

import importlib.util
from typing import Any

import numpy as np
import pytest

from data_pipeline.native import library
from data_pipeline.native.library import kernels
from megatron_joy.errors import UserError


def test_a_library_that_was_not_built_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str, package: str | None = None) -> Any:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", none)
    kernels.cache_clear()
    with pytest.raises(UserError, match=r"not built, expected a compiled library .*make setup"):
        kernels()
    monkeypatch.undo()
    kernels.cache_clear()
    assert kernels() is kernels()


def test_a_library_of_other_sources_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """After sources were fetched and nothing was built."""
    monkeypatch.setitem(library.FUNCTIONS, "joy_of_tomorrow", (None, []))
    kernels.cache_clear()
    with pytest.raises(UserError, match=r"built from other sources, it has no joy_of_tomorrow; run `make setup`"):
        kernels()
    monkeypatch.undo()
    kernels.cache_clear()


def test_counting_ids_equals_bincount_and_says_what_is_outside() -> None:
    ids = np.random.default_rng(1).integers(0, 1000, 20_000, dtype=np.uint32)
    counts = np.ones(900, dtype=np.int64)
    outside = kernels().joy_count(ids, len(ids), counts, 900)
    assert outside == np.count_nonzero(ids >= 900)
    assert np.array_equal(counts - 1, np.bincount(ids, minlength=1000)[:900])


def test_union_find_equals_plain_relabelling() -> None:
    rng = np.random.default_rng(2)
    pairs = rng.integers(0, 400, (260, 2))
    labels = np.arange(400)
    for left, right in pairs.tolist():
        low, high = sorted((labels[left], labels[right]))
        labels[labels == high] = low
    parent = np.arange(400, dtype=np.int64)
    left, right = np.ascontiguousarray(pairs.T)
    kernels().joy_union(parent, left, right, len(pairs))
    kernels().joy_flatten(parent, 400)
    assert np.array_equal(parent, labels)
    assert len(set(labels.tolist())) < 300
