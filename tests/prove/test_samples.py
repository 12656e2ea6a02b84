"""The text of a proof has document borders of every kind and depends on seed and index alone."""

import numpy as np

from megatron_joy.prove.samples import EOD, batches, sample
from megatron_joy.prove.shrink import one_process, shrink
from megatron_joy.recipe import load_recipe

LENGTH, VOCABULARY = 64, 128


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    for index in range(8):
        one, again = (sample(3, index, LENGTH, VOCABULARY).tokens for _ in range(2))
        assert np.array_equal(one, again)
        assert one.shape == (LENGTH + 1,) and one.min() >= 0 and one.max() < VOCABULARY
    assert not np.array_equal(sample(3, 1, LENGTH, VOCABULARY).tokens, sample(4, 1, LENGTH, VOCABULARY).tokens)


def test_samples_have_no_border_many_borders_one_in_the_middle_and_empty_documents() -> None:
    kinds = [[sample(1, 4 * i + kind, LENGTH, VOCABULARY).tokens for i in range(10)] for kind in range(4)]
    assert all(not (tokens == EOD).any() for tokens in kinds[0])
    assert all((tokens == EOD).sum() > 3 for tokens in kinds[1])
    assert any(((tokens[:-1] == EOD) & (tokens[1:] == EOD)).any() for tokens in kinds[1])
    assert all(np.flatnonzero(tokens == EOD).tolist() == [LENGTH // 2 - 1] for tokens in kinds[2])
    assert len({tuple(np.flatnonzero(tokens == EOD)) for tokens in kinds[3]}) > 5


def test_ranks_together_read_what_one_process_reads() -> None:
    small = shrink(load_recipe("joyai_tiny"), 2, 12).recipe
    whole = batches(one_process(small), 5, 0)[0].tokens
    shares = [batches(small, 5, rank) for rank in range(2)]
    read = [micro[rank].tokens for micro in zip(*shares, strict=True) for rank in range(2)]
    assert np.array_equal(np.concatenate(read), whole)
    assert not np.array_equal(whole, batches(one_process(small), 6, 0)[0].tokens)
