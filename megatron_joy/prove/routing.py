"""Routing of the reference, kept and imposed on the layout, so that rounding can't decide which expert a token gets.

Choosing experts is a step function: where two experts' scores differ by less than rounding, two correct programs choose
differently, and with the update of the router biases, which is a sign, they soon compute different things. So the
reference's choice is taken everywhere, and a proof asks instead how far it is from the layout's own: not further than a
tie that rounding explains. Weights, losses and gradients are the layout's own throughout.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_joy.data.batch import Batch
from megatron_joy.data.steps import BatchShape, micro_batch_indices
from megatron_joy.platform.process import Process
from megatron_joy.prove.numbers import Routing
from megatron_joy.recipe.schema import Recipe
from megatron_joy.train.forward import local_batch

ComputeTopK = Callable[..., tuple[Tensor, Tensor]]


def _key(step: int, layer: int) -> str:
    return f"step {step}, layer {layer}"


def _routers(chunks: Sequence[Any]) -> Iterator[TopKRouter]:
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, TopKRouter))


def _places(recipe: Recipe, process: Process, step: int, batches: Sequence[Batch]) -> list[Tensor]:
    """For each micro-batch, where in the step's global batch the tokens lie that this rank's routers see, in order."""
    train, length = recipe.train, recipe.data.sequence_length
    shape = BatchShape(train.global_batch_size, train.micro_batch_size, recipe.layout.data_parallel_size)
    rows = micro_batch_indices(0, shape, process.groups.dp.rank())
    places = []
    for batch, samples in zip(batches, rows, strict=True):
        place = torch.tensor(samples)[:, None] * length + torch.arange(length)  # [b, s]
        local = local_batch(replace(batch, tokens=place), process).tokens  # [1, b * s] or [b, s / cp]
        # The model's tensors are [s, b, h], cut along s over tensor-parallel ranks (sequence parallelism).
        places.append(local.T.chunk(process.groups.tp.size())[process.groups.tp.rank()].flatten())
    return places


class _Hook:
    """What Megatron-core's router asks instead of top-k (its `router_replay`). One for each router."""

    def __init__(self, layer: int, book: "RoutingBook") -> None:
        self.layer, self.book = layer, book
        self.calls = {False: 0, True: 0}

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: Any, group_topk: Any, default_compute_topk: ComputeTopK
    ) -> tuple[Tensor, Tensor]:
        """scores [tokens, experts] -> (scores of the chosen experts, chosen experts), both [tokens, topk]."""
        values, chosen = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        # Micro-batches come in order, once without gradients and once more with them where activations are recomputed.
        again = torch.is_grad_enabled()
        places = self.book.places[self.calls[again]]
        self.calls[again] += 1
        return self.book.decide(self.layer, places, scores, values, chosen)


class RoutingBook:
    """All routers of this rank; `begin` tells it the step before each one. This class leaves choices as they are."""

    def __init__(self, recipe: Recipe, process: Process, chunks: Sequence[Any]) -> None:
        self.recipe, self.process = recipe, process
        self.step, self.places = 0, list[Tensor]()
        self._hooks = []
        for router in _routers(chunks):
            router.router_replay = _Hook(router.layer_number, self)
            self._hooks.append(router.router_replay)

    def begin(self, step: int, batches: Sequence[Batch]) -> None:
        """The next forward passes are those of these micro-batches."""
        self.step, self.places = step, _places(self.recipe, self.process, step, batches)
        for hook in self._hooks:
            hook.calls = {False: 0, True: 0}

    def decide(
        self, layer: int, places: Tensor, scores: Tensor, values: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The routing of tokens that lie at `places` of the global batch."""
        return values, chosen


class RoutingRecord(RoutingBook):
    """Keeps what the reference chose, for all tokens of each step."""

    def __init__(self, recipe: Recipe, process: Process, chunks: Sequence[Any]) -> None:
        super().__init__(recipe, process, chunks)
        self._tables: dict[str, Tensor] = {}

    def decide(
        self, layer: int, places: Tensor, scores: Tensor, values: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        tokens = self.recipe.train.global_batch_size * self.recipe.data.sequence_length
        empty = torch.full((tokens, chosen.shape[1]), -1, dtype=torch.int32)
        table = self._tables.setdefault(_key(self.step, layer), empty)
        table[places] = chosen.to(torch.int32)
        return values, chosen

    def write(self, path: Path) -> None:
        """One table [tokens, topk] for each step and MoE layer."""
        save_file(self._tables, path)


class RoutingFollow(RoutingBook):
    """Imposes what was recorded and measures how far from this rank's own choice that is."""

    def __init__(self, recipe: Recipe, process: Process, chunks: Sequence[Any], path: Path) -> None:
        super().__init__(recipe, process, chunks)
        self._path = path
        self._decisions, self._overruled, self._widest = 0, 0, 0.0

    def decide(
        self, layer: int, places: Tensor, scores: Tensor, values: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        with safe_open(self._path, framework="pt") as file:
            imposed = file.get_tensor(_key(self.step, layer))[places].long()
        imposed_values = scores.gather(1, imposed)
        differs = (imposed.sort(-1).values != chosen.sort(-1).values).any(-1)
        gap = (values.min(-1).values - imposed_values.min(-1).values).detach()
        self._decisions += len(differs)
        self._overruled += int(differs.sum())
        self._widest = max(self._widest, float(gap[differs].max()) if differs.any() else 0.0)
        return imposed_values, imposed

    @property
    def told(self) -> Routing:
        """This rank's decisions so far."""
        return Routing(self._decisions, self._overruled, self._widest)
