"""What speculative decoding would gain from the MTP layer as it is: drafts and checks on validation texts.

From the middle of each text the model writes on greedily; before each of its passes the MTP layer drafts a few tokens
(the layer used again and again, arXiv 2604.03044, 4.2), and the pass keeps those that it would have written itself.
`infer.speculative` does the same with caches in one process. Here every pass reads whole rows through the training
model in the run's own layout: nothing is gathered or exported, and a broken head shows while it can be mended.

Letters: b rows, s row length, h hidden, v vocabulary of a TP rank, m positions of a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_joy.data.batch import Batch
from megatron_joy.model.places import token_places
from megatron_joy.platform.process import Process
from megatron_joy.train.forward import local_batch, model_inputs
from megatron_joy.train.step import Trainer

DRAFTS = 3  # what the paper's serving uses


@dataclass(frozen=True)
class Acceptance:
    """`accepted[d]`: how many of the model's passes, those of all rows together, had their first d + 1 drafts right."""

    passes: int
    accepted: tuple[int, ...]

    @property
    def length(self) -> float:
        """Mean tokens that a pass gives, its own one included."""
        return 1.0 + sum(self.accepted) / self.passes

    @property
    def ratio(self) -> float:
        """Accepted over drafted tokens."""
        return sum(self.accepted) / (self.passes * len(self.accepted))

    def as_row(self) -> dict[str, float]:
        """For a row of metrics."""
        shares = {f"mtp_acceptance_{d + 1}": number / self.passes for d, number in enumerate(self.accepted)}
        return {"mtp_acceptance_length": self.length, "mtp_acceptance_ratio": self.ratio} | shares


class _Places:
    """Single positions of rows in this rank's hidden states."""

    def __init__(self, rows: int, length: int, groups: ProcessGroupCollection, device: torch.device) -> None:
        self.length, self.group = length, groups.tp_cp
        places = token_places(rows, length, groups).flatten().to(device)
        self.local = torch.full((rows * length,), -1, device=device)  # where a token lies here, -1: elsewhere
        self.local[places] = torch.arange(len(places), device=device)

    def _find(self, positions: Tensor) -> Tensor:
        row = torch.arange(len(positions), device=positions.device)[:, None]
        return self.local[row * self.length + positions]  # [b, m]

    def pick(self, states: Tensor, positions: Tensor) -> Tensor:
        """states [s', b', h] of this rank, positions [b, m] -> [b, m, h], the same on all ranks of TP x CP."""
        found = self._find(positions)
        picked = states.flatten(0, 1)[found.clamp(min=0)] * (found >= 0)[..., None]
        if self.group.size() > 1:
            dist.all_reduce(picked, group=self.group)  # one of them has it, the others add zeros
        return picked

    def put(self, states: Tensor, positions: Tensor, values: Tensor) -> Tensor:
        """A copy of states with values [b, m, h] at positions [b, m]."""
        found, changed = self._find(positions), states.clone()
        here = found >= 0
        changed.flatten(0, 1)[found[here]] = values[here]
        return changed


def _best(states: Tensor, head: Tensor, group: Any) -> Tensor:
    """states [..., h], head [v, h] of this TP rank -> int64 [...], the likeliest token of the whole vocabulary."""
    values, ids = (states @ head.t()).float().max(-1)
    if group.size() == 1:
        return ids
    ids = ids + group.rank() * len(head)
    every = [[torch.empty_like(x) for _ in range(group.size())] for x in (values, ids)]
    dist.all_gather(every[0], values, group=group)
    dist.all_gather(every[1], ids, group=group)
    return torch.stack(every[1]).gather(0, torch.stack(every[0]).argmax(0, keepdim=True))[0]


@dataclass
class _Texts:
    """Rows that are written on: tokens [b, s], of which the first known [b] are certain, then `guessed` drafts."""

    process: Process
    tokens: Tensor
    known: Tensor
    drafts: int
    places: _Places
    guessed: int = 0
    passes: int = 0
    accepted: Tensor = field(init=False)  # int64 [drafts], summed over rows

    def __post_init__(self) -> None:
        self.accepted = torch.zeros(self.drafts, dtype=torch.int64, device=self.tokens.device)

    @property
    def batch(self) -> Batch:
        """All rows, each as one document."""
        rows, length = self.tokens.shape
        zeros, empty = torch.zeros_like(self.tokens), torch.zeros_like(self.tokens, dtype=torch.float32)
        borders = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
        places = torch.arange(length, device=self.tokens.device).expand(rows, length)
        return Batch(self.tokens.clone(), zeros, empty, zeros, empty, places, borders, length)

    def _at(self, first: Tensor, count: int) -> Tensor:
        """[b, count]: positions from first [b] on."""
        return first[:, None] + torch.arange(count, device=first.device)

    def check(self, chunk: Any, hidden: Tensor) -> None:
        """The model's pass, hidden [s', b', h] after its final norm: keeps the right drafts and its own next token."""
        positions = self._at(self.known - 1, self.guessed + 1)
        choices = _best(self.places.pick(hidden, positions), chunk.output_layer.weight, self.process.groups.tp)
        guesses = self.tokens.gather(1, positions[:, 1:])
        right = (guesses == choices[:, :-1]).long().cumprod(1)  # [b, guessed]
        kept = right.sum(1)
        self.tokens.scatter_(1, (self.known + kept)[:, None], choices.gather(1, kept[:, None]))
        self.known += kept + 1
        if self.guessed:
            self.passes += 1
            self.accepted += right.sum(0)

    def draft(self, chunk: Any, kwargs: dict[str, Any], states: Tensor) -> None:
        """The MTP layer's drafts after the known tokens; states [s', b', h] are what it made of `kwargs`."""
        hidden, at = kwargs["hidden_states"], self.known - 2  # the last token whose successor is known
        for number in range(self.drafts):
            last = self.places.pick(states, at[:, None])
            guess = _best(last, chunk.output_layer.weight, self.process.groups.tp)
            self.tokens.scatter_(1, (self.known + number)[:, None], guess)
            if number + 1 < self.drafts:
                at = at + 1
                hidden = self.places.put(hidden, at[:, None], last)
                ids = local_batch(self.batch, self.process).tokens
                states = chunk.mtp.forward(**kwargs | {"input_ids": ids, "hidden_states": hidden}).chunk(2)[1]
        self.guessed = self.drafts

    def agree(self) -> None:
        """The last pipeline stage, where drafts are made and checked, tells the others."""
        pp = self.process.groups.pp
        if pp.size() > 1:
            for tensor in (self.tokens, self.known):
                dist.broadcast(tensor, src=dist.get_global_rank(pp, pp.size() - 1), group=pp)


def _forward(process: Process, texts: Iterator[_Texts], model: Any) -> tuple[Tensor, Any]:
    """One pass, as Megatron-core's schedules call it for each micro-batch on each pipeline chunk."""
    text, chunk = next(texts), unwrap_model(model)

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        text.check(chunk, kwargs["hidden_states"])
        return args, kwargs | {"input_ids": local_batch(text.batch, process).tokens}

    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        text.draft(chunk, kwargs, output.chunk(2)[1])

    hooks = []
    if chunk.mtp_process:
        hooks = [
            chunk.mtp.register_forward_pre_hook(before, with_kwargs=True),
            chunk.mtp.register_forward_hook(after, with_kwargs=True),
        ]
    batch = local_batch(text.batch, process)
    try:
        output = model(
            batch.tokens, batch.position_ids, labels=batch.labels, loss_mask=None, **model_inputs(batch, process)
        )
    finally:
        for hook in hooks:
            hook.remove()
    return output, lambda losses: (losses.new_zeros(()), torch.zeros((), dtype=torch.int), {})


def _texts(process: Process, batch: Batch, drafts: int) -> _Texts:
    """Each row up to its middle, from where the document begins that the middle is in."""
    rows, length = batch.tokens.shape
    tokens, known = torch.zeros_like(batch.tokens), torch.zeros(rows, dtype=torch.int64)
    end = length // 2
    for row in range(rows):
        known[row] = size = int(batch.position_ids[row, end - 1]) + 1
        tokens[row, :size] = batch.tokens[row, end - size : end]
    places = _Places(rows, length, process.groups, process.device)
    return _Texts(process, tokens.to(process.device), known.to(process.device), drafts, places)


@torch.no_grad()
def measure_acceptance(
    trainer: Trainer, batches: Sequence[Batch], passes: int, drafts: int = DRAFTS
) -> Acceptance | None:
    """Drafts on the first micro-batch of every data-parallel rank (with interleaving: the first PP of them).

    passes: at most so many of the model, less where half a row has no room for them; None where it has none for one.
    Collective; the result is the same on all ranks. Touches neither weights nor counters.
    """
    process, several = trainer.process, len(trainer.chunks) > 1
    rows, length = batches[0].tokens.shape
    passes = min(passes, (length - length // 2 - 1) // (drafts + 1))
    if passes < 1:
        return None
    count = process.groups.pp.size() if several else 1
    texts = [_texts(process, batch, drafts) for batch in batches[:count]]
    packed = process.groups.cp.size() == 1
    for chunk in trainer.chunks:
        chunk.eval()
    try:
        for _ in range(passes + 1):  # the first reads the prompts
            trainer.schedule(
                forward_step_func=partial(_forward, process),
                data_iterator=[iter(texts) for _ in trainer.chunks] if several else iter(texts),
                model=trainer.chunks if several else trainer.chunks[0],
                num_microbatches=len(texts),
                seq_length=length * rows if packed else length,
                micro_batch_size=1 if packed else rows,
                forward_only=True,
            )
            for text in texts:
                text.agree()
    finally:
        for chunk in trainer.chunks:
            chunk.train()
    return _summed(process, texts, passes * rows * len(texts))


def _summed(process: Process, texts: Sequence[_Texts], passes: int) -> Acceptance:
    """Over data-parallel ranks; from the last stage to all."""
    groups = process.groups
    accepted = torch.stack([text.accepted for text in texts]).sum(0)
    dist.all_reduce(accepted, group=groups.dp)
    dist.broadcast(accepted, src=dist.get_global_rank(groups.pp, groups.pp.size() - 1), group=groups.pp)
    return Acceptance(passes * groups.dp.size(), tuple(accepted.tolist()))
