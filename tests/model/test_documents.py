"""Documents packed into one row don't see each other, and each is read as if it stood alone."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_joy.model.build import build_model
from megatron_joy.platform import process as platform
from megatron_joy.train.forward import local_batch, model_inputs
from tests.model import naive
from tests.model.small import EOD, LENGTH, VOCABULARY, batch, row, small_recipe


@pytest.fixture
def process() -> Iterator[platform.Process]:
    with platform.alone() as made:
        yield made


def logits(model: torch.nn.Module, process: platform.Process, rows: list[Tensor]) -> Tensor:
    """[b * s, vocabulary]."""
    packed = local_batch(batch(rows), process)
    with torch.no_grad():
        out: Tensor = model(packed.tokens, packed.position_ids, **model_inputs(packed, process))
    return out.squeeze(0)


@pytest.mark.parametrize("experts_per_token", [8, 2])
def test_changing_one_document_leaves_the_others_as_they_are(process: platform.Process, experts_per_token: int) -> None:
    """To the bit where every token goes to all 8 experts.

    With 2 of them the changed document's tokens go to other experts: products of other sizes, summed in another order.
    """
    (model,) = build_model(small_recipe(model={"num_experts_per_tok": experts_per_token}), process)
    first, second = row([9, 14], 1), row([4, 4, 4], 2)
    changed = first.clone()
    changed[:8] = torch.randint(1, VOCABULARY, (8,), generator=torch.Generator().manual_seed(9))
    before, after = logits(model, process, [first, second]), logits(model, process, [changed, second])
    assert not torch.equal(before[8], after[8])  # the first document's eod, itself the same token, has read it
    tolerance = 0.0 if experts_per_token == 8 else 2e-6
    torch.testing.assert_close(before[9:], after[9:], rtol=0, atol=tolerance)


def test_positions_restart_so_that_a_document_alone_gives_the_same_logits(process: platform.Process) -> None:
    recipe = small_recipe()
    (model,) = build_model(recipe, process)
    packed = row([9, 14], 1)
    inside = logits(model, process, [packed])[9:23]
    alone = torch.cat([packed[9:23], row([], 3)[: LENGTH + 1 - 14]])
    torch.testing.assert_close(inside, logits(model, process, [alone])[:14], rtol=1e-5, atol=1e-6)
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        expected = naive.read(packed[9:23], weights, recipe.model).logits
    torch.testing.assert_close(inside, expected, rtol=1e-5, atol=1e-6)
    assert int(packed[22]) == EOD
