"""Batches equal a reference that goes token by token; the union over ranks is the step, whatever the layout."""

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_joy.data.batch import ROW_FIELDS, Batch, BatchLoader, context_parallel_slice, make_batch
from megatron_joy.data.steps import BatchShape, micro_batch_indices
from megatron_joy.data.stream import Sample, SampleStream
from megatron_joy.errors import UserError
from megatron_joy.recipe.schema import DataSection

from .tiny_shards import dealt, some_texts, write_shard_set

EOD = 0


def samples_of(rows: Sequence[Sequence[int]]) -> list[Sample]:
    return [Sample(np.array(row, dtype=np.int64), "s", 0, k, 0, EOD) for k, row in enumerate(rows)]


def reference(rows: Sequence[Sequence[int]], document_mask: bool) -> dict[str, Any]:
    """One token at a time, by the words of the docstring of `Batch`."""
    out: dict[str, Any] = {name: [] for name in ROW_FIELDS}
    borders = [0]
    for row in rows:
        length = len(row) - 1
        # Documents of the s + 1 tokens that were read; the next one starts after each eod.
        document = list(itertools.accumulate([0] + [int(document_mask and token == EOD) for token in row[:-1]]))
        lines: dict[str, list[float]] = {name: [] for name in ROW_FIELDS}
        position = 0
        for t in range(length):
            if t > 0 and document[t] != document[t - 1]:
                borders.append(borders[0] + len(out["tokens"]) * length + t)
                position = 0
            second = t + 2 <= length
            lines["tokens"].append(row[t])
            lines["labels"].append(row[t + 1])
            lines["loss_mask"].append(float(document[t + 1] == document[t]))
            lines["mtp_labels"].append(row[t + 2] if second else 0)
            lines["mtp_loss_mask"].append(float(second and document[t + 2] == document[t]))
            lines["position_ids"].append(position)
            position += 1
        for name in ROW_FIELDS:
            out[name].append(lines[name])
        borders.append(len(out["tokens"]) * length)
    out["cu_seqlens"] = borders
    out["max_seqlen"] = max(b - a for a, b in itertools.pairwise(borders))
    return out


def check(batch: Batch, expected: dict[str, Any]) -> None:
    for name in ROW_FIELDS:
        assert getattr(batch, name).tolist() == expected[name], name
        assert getattr(batch, name).dtype == (torch.float32 if "mask" in name else torch.int64)
        assert getattr(batch, name).is_contiguous()
    assert batch.cu_seqlens.tolist() == expected["cu_seqlens"]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == expected["max_seqlen"]


ROWS = st.integers(1, 12).flatmap(
    lambda s: st.lists(st.lists(st.integers(0, 3), min_size=s + 1, max_size=s + 1), min_size=1, max_size=4)
)


@settings(deadline=None, max_examples=300)
@given(ROWS, st.booleans())
def test_batches_equal_a_token_by_token_reference(rows: list[list[int]], document_mask: bool) -> None:
    check(make_batch(samples_of(rows), document_mask, EOD), reference(rows, document_mask))


def test_a_row_written_out_by_hand() -> None:
    #        document 1    | 2    | 3 (goes on in the next row)
    row = [5, 6, EOD, 7, EOD, 8, 9]
    batch = make_batch(samples_of([row]), True, EOD)
    assert batch.tokens.tolist() == [[5, 6, 0, 7, 0, 8]]
    assert batch.labels.tolist() == [[6, 0, 7, 0, 8, 9]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1, 0, 1]]
    assert batch.mtp_labels.tolist() == [[0, 7, 0, 8, 9, 0]]
    assert batch.mtp_loss_mask.tolist() == [[1, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert batch.max_seqlen == 3


def test_an_eod_at_the_end_of_a_row_makes_no_empty_document() -> None:
    batch = make_batch(samples_of([[5, EOD, 6], [EOD, EOD, EOD]]), True, EOD)
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 4]
    check(batch, reference([[5, EOD, 6], [EOD, EOD, EOD]], True))


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_context_parallel_ranks_hold_mirrored_chunks_of_every_row(cp: int) -> None:
    generator = np.random.default_rng(0)
    batch = make_batch(samples_of(generator.integers(0, 9, (3, 17)).tolist()), True, EOD)
    chunk = 16 // (2 * cp)
    for name in ROW_FIELDS:
        whole, rebuilt = getattr(batch, name), torch.full((3, 16), -1.0)
        for rank in range(cp):
            part = context_parallel_slice(batch, rank, cp)
            assert part.cu_seqlens is batch.cu_seqlens and part.max_seqlen == batch.max_seqlen
            assert getattr(part, name).shape == (3, 16 // cp)
            if cp == 1:
                assert part is batch
            for half, held in enumerate((rank, 2 * cp - 1 - rank)):
                rebuilt[:, held * chunk : (held + 1) * chunk] = getattr(part, name)[:, half * chunk :][:, :chunk]
        if cp > 1:
            assert torch.equal(rebuilt, whole.float())
    if cp > 1:
        with pytest.raises(ValueError, match="rows of 15 tokens do not split"):
            context_parallel_slice(make_batch(samples_of([range(16)]), True, EOD), 0, cp)


def test_packing_and_moving_keep_everything() -> None:
    batch = make_batch(samples_of([[1, 2, EOD, 3, 4], [EOD, 1, 2, 3, 4]]), True, EOD)
    packed = batch.packed()
    for name in ROW_FIELDS:
        assert torch.equal(getattr(packed, name), getattr(batch, name).reshape(1, 8))
        assert torch.equal(getattr(batch.to("cpu"), name), getattr(batch, name))
    assert torch.equal(packed.cu_seqlens, batch.cu_seqlens)
    assert batch.to("meta").cu_seqlens.device.type == "meta"


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(0, 10**9))
def test_ranks_share_a_step_without_gap_or_overlap(micro: int, accumulation: int, ranks: int, step: int) -> None:
    shape = BatchShape(micro * accumulation * ranks, micro, ranks)
    taken = [k for rank in range(ranks) for part in micro_batch_indices(step, shape, rank) for k in part]
    assert sorted(taken) == list(range(step * shape.global_batch_size, (step + 1) * shape.global_batch_size))
    for rank in range(ranks):
        parts = micro_batch_indices(step, shape, rank)
        assert len(parts) == shape.micro_batches == accumulation
        for m, part in enumerate(parts):
            first = step * shape.global_batch_size + (m * ranks + rank) * micro
            assert part == list(range(first, first + micro))


def test_shapes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="global batch of 8 over 3 ranks in micro-batches of 2"):
        micro_batch_indices(0, BatchShape(8, 2, 3), 0)
    with pytest.raises(ValueError, match="data-parallel rank 2 of 2"):
        micro_batch_indices(0, BatchShape(8, 2, 2), 2)


@pytest.fixture
def stream(tmp_path: Path) -> SampleStream:
    write_shard_set(tmp_path, some_texts(4, 40))
    data = {"sequence_length": 16, "train": [{"manifest": str(tmp_path)}]}
    return SampleStream(DataSection.model_validate(data), 7, "train")


def step_rows(stream: SampleStream, step: int, ranks: int, micro: int) -> set[tuple[int, ...]]:
    """All rows of a step over the ranks of a layout, each with its label row, as sets (rows differ in this data)."""
    rows = set()
    for rank in range(ranks):
        with BatchLoader(stream, dealt(BatchShape(8, micro, ranks), rank), True, step, step + 1) as loader:
            for batch in next(loader):
                for row in torch.cat([batch.tokens, batch.labels, batch.position_ids], dim=1).tolist():
                    rows.add(tuple(row))
    return rows


def test_a_step_holds_the_same_samples_in_every_layout(stream: SampleStream) -> None:
    for step in (0, 1, 17):
        one = step_rows(stream, step, 1, 8)
        assert len(one) == 8
        for ranks, micro in ((1, 2), (2, 4), (2, 1), (4, 2), (8, 1)):
            assert step_rows(stream, step, ranks, micro) == one


def equal(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one, other, strict=True)
        for name in (*ROW_FIELDS, "cu_seqlens")
    )


def test_resuming_at_a_step_gives_what_an_uninterrupted_run_gets(stream: SampleStream) -> None:
    shape = BatchShape(8, 2, 2)
    with BatchLoader(stream, dealt(shape, 1), True, last_step=12) as loader:
        whole = list(loader)
    assert len(whole) == 12
    for start in (1, 5, 11, 12):
        with BatchLoader(stream, dealt(shape, 1), True, start, 12, ahead=1) as loader:
            rest = list(loader)
            assert list(loader) == []  # it stays ended
        assert len(rest) == 12 - start
        assert all(equal(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_an_error_while_reading_reaches_the_consumer_at_its_step(stream: SampleStream) -> None:
    class Broken:
        eod_id = EOD

        def sample(self, k: int) -> Sample:
            if k >= 16:
                raise UserError("shard_00007.bin: cut short")
            return stream.sample(k)

    with BatchLoader(Broken(), dealt(BatchShape(8, 8, 1), 0), True) as loader:  # type: ignore[arg-type]
        assert len(next(loader)) == 1
        assert len(next(loader)) == 1
        with pytest.raises(UserError, match=r"shard_00007\.bin: cut short"):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)


def test_closing_ends_the_thread_even_when_nobody_reads(stream: SampleStream) -> None:
    before = threading.active_count()
    loader = BatchLoader(stream, dealt(BatchShape(8, 8, 1), 0), True)
    next(loader)
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loader)


def test_a_wrong_shape_is_refused_before_a_thread_starts(stream: SampleStream) -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match="global batch of 9"):
        BatchLoader(stream, dealt(BatchShape(9, 2, 1), 0), True)
    assert threading.active_count() == before


def test_attended_positions_are_the_ones_in_the_mask() -> None:
    ids = torch.tensor([[5, 0, 5, 5, 5, 0, 5, 5], [0, 5, 5, 5, 5, 5, 5, 0]])
    samples = samples_of([[*row, 5] for row in ids.tolist()])
    for masked in (True, False):
        batch = make_batch(samples, masked, 0)
        document = torch.bucketize(torch.arange(16), batch.cu_seqlens[1:].long(), right=True)
        pairs = (document[:, None] == document[None]) & torch.ones(16, 16).tril().bool()
        assert batch.attended == int(pairs.sum())
