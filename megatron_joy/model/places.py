"""Which token of a micro-batch stands where in a rank's hidden states."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor


def token_places(rows: int, length: int, groups: ProcessGroupCollection) -> Tensor:
    """int64 [s', b'], as hidden states [s', b', h] lie on this rank: row * length + position of each token.

    Without context parallelism rows are packed into one; with it this rank has two chunks of each row
    (`data.batch.context_parallel_slice`). Under TP each rank has an equal part of the sequence (sequence parallelism).
    """
    places = torch.arange(rows * length).view(rows, length)
    cp, tp = groups.cp, groups.tp
    if cp.size() > 1:
        chunks = places.view(rows, 2 * cp.size(), -1)
        places = torch.cat([chunks[:, cp.rank()], chunks[:, 2 * cp.size() - 1 - cp.rank()]], dim=1)
    else:
        places = places.view(1, -1)
    return places.t().chunk(tp.size())[tp.rank()].contiguous()
