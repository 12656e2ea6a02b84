"""Where a number that is none came from: rank, micro-batch, layer and documents, found by computing the step again."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_joy.checkpoint.contents import unwrapped
from megatron_joy.data.steps import planned_indices
from megatron_joy.data.stream import SampleStream
from megatron_joy.data.trace import trace_sample
from megatron_joy.errors import UserError
from megatron_joy.recipe.timetable import Timetable
from megatron_joy.train.run import Run
from megatron_joy.train.step import Computed, Trainer

NAMED = 3  # documents in a line; the event has up to LISTED of them
LISTED = 50
AFTER_ALL_LAYERS = 1 << 30


@dataclass(frozen=True)
class Culprit:
    """Where it was seen first: `what` is a module's output, or a parameter's gradient, by its name in the model.

    micro_batches: numbers on its data-parallel rank; documents: rows of `data.trace`, each document once.
    """

    rank: int
    micro_batches: tuple[int, ...]
    what: str
    documents: tuple[dict[str, Any], ...]
    others: int = 0  # further ranks that saw it in the same layer
    how: str = "first in"

    def __str__(self) -> str:
        also = f" and {self.others} more" if self.others else ""
        batch = ", ".join(map(str, self.micro_batches))
        return f"{self.how} {self.what} on rank {self.rank}{also}, micro-batch {batch}, with {listed(self.documents)}"

    def as_extra(self) -> dict[str, Any]:
        """For an event."""
        return {
            "rank": self.rank,
            "micro_batches": list(self.micro_batches),
            "where": self.what,
            "documents": list(self.documents[:LISTED]),
        }


def listed(documents: Sequence[dict[str, Any]]) -> str:
    """The documents in a few words: source, file and offset of each, or shard and number where that is not recorded."""
    if not documents:
        return "no document"
    more = f" and {len(documents) - NAMED} more documents" if len(documents) > NAMED else ""
    return ", ".join(_name(row) for row in documents[:NAMED]) + more


def _name(row: dict[str, Any]) -> str:
    place = f"{row['shard']} document {row['document']}"
    if row["origin"] is None:
        return f"{row['source']}: {place}"
    return f"{row['source']}: {row['origin']['file']} @ {row['origin']['offset']} ({place})"


def documents_of(run: Run, update: int, micro_batches: Sequence[int]) -> tuple[dict[str, Any], ...]:
    """The documents of these micro-batches of an update on this rank, each once; none where the shards don't say.

    Opens the shards anew: the loader's thread is reading them.
    """
    recipe, found = run.recipe, dict[tuple[str, str, int], dict[str, Any]]()
    indices = planned_indices(
        update - 1, Timetable(recipe), run.ledger, recipe.layout.data_parallel_size, run.process.groups.dp.rank()
    )
    stream = SampleStream(recipe.data, recipe.seed, "train", run.ledger)
    try:
        for k in (k for m in micro_batches for k in indices[m]):
            for row in trace_sample(stream, k):
                found.setdefault((row["source"], row["shard"], row["document"]), row)
    except UserError:
        return ()
    finally:
        stream.close()
    return tuple(found.values())


def find_culprit(run: Run, trainer: Trainer, update: int, batches: Sequence[Any]) -> Culprit | None:
    """Computes an update's micro-batches again, one after the other, and looks for the first number that is none.

    All ranks call it together, after gradients were reduced and before the next step; gradients are lost by it, nothing
    else changes. None when every number is one this time: then it was neither the data nor the weights.
    """
    layout = run.recipe.layout
    interleaved = layout.virtual_pipeline_model_parallel_size > 1
    group = layout.pipeline_model_parallel_size if interleaved else 1  # so many at a time, or the schedule refuses
    for first in range(0, len(batches), group):
        mine = tuple(range(first, first + group))
        seen = _first_seen(trainer, batches[first : first + group])
        answers: list[Any] = [None] * run.process.info.world_size
        dist.all_gather_object(answers, seen)
        guilty = {rank: answer for rank, answer in enumerate(answers) if answer is not None}
        if guilty:
            rank = min(guilty, key=lambda rank: (guilty[rank][0], rank))
            holder: list[Any] = [None]
            if run.process.info.rank == rank:
                holder[0] = documents_of(run, update, mine)
            dist.broadcast_object_list(holder, src=rank)
            layer = guilty[rank][0][0]  # elsewhere in the model it is what follows from this
            others = sum(answer[0][0] == layer for answer in guilty.values()) - 1
            return Culprit(rank, mine, guilty[rank][1], holder[0], others)
    return None


def _first_seen(trainer: Trainer, batches: Sequence[Any]) -> tuple[tuple[int, int], str] | None:
    """(order, what): the smaller the order the earlier in the computation; None where all is finite here."""
    watch = _Watch()
    with watch.over(trainer):
        trainer.compute_alone(batches)
    if watch.seen is not None:
        return watch.seen
    # A gradient goes from the loss down: the one that is last in the model's order was the first that was none.
    bad = [name for name, grad in local_gradients(trainer) if not bool(torch.isfinite(grad).all())]
    return ((AFTER_ALL_LAYERS, 1), f"the gradient of {bad[-1]}") if bad else None


def local_gradients(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    """(global name, this rank's gradient before it is reduced) of each parameter, in the model's order."""
    for chunk in unwrapped(trainer.chunks):
        names = layer_names(chunk)
        for name, param in chunk.named_parameters():
            if getattr(param, "main_grad", None) is not None:
                yield global_name(name, names), param.main_grad


def layer_names(chunk: Any) -> dict[str, int]:
    """Prefix of each decoder layer in this chunk -> its number in the whole model, from 0."""
    return {
        name: int(module.layer_number) - 1
        for name, module in chunk.named_modules()
        if name.rpartition(".")[0].endswith("decoder.layers") and hasattr(module, "layer_number")
    }


def global_name(name: str, layers: dict[str, int]) -> str:
    """A name in a pipeline chunk as the whole model has it: its layers count on over the chunks."""
    for prefix, number in layers.items():
        if name == prefix or name.startswith(prefix + "."):
            return f"{prefix.rpartition('.')[0]}.{number}{name[len(prefix) :]}"
    return name


class _Watch:
    """Looks for the first module of this rank whose output is no number."""

    def __init__(self) -> None:
        self.seen: tuple[tuple[int, int], str] | None = None
        self._calls = 0  # alike on all ranks of a pipeline stage: who is earlier in it was the first

    @contextmanager
    def over(self, trainer: Trainer) -> Iterator[None]:
        """Inside, `seen` becomes ((number of the layer, module calls before it), what)."""
        with ExitStack() as hooks:
            for chunk in unwrapped(trainer.chunks):
                names = layer_names(chunk)
                for name, module in chunk.named_modules():
                    label = global_name(name, names) or "the model"
                    look = partial(self._look, _layer_of(name, names), label)
                    hooks.callback(module.register_forward_hook(look).remove)
            yield

    def _look(self, layer: int, label: str, module: Any, inputs: Any, output: Any) -> None:
        self._calls += 1
        if self.seen is not None:
            return
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                self.seen = (layer, self._calls), f"the output of {label}"
                return


def _layer_of(name: str, layers: dict[str, int]) -> int:
    """Number of the decoder layer that a module is in, from 0; before them the embedding, after them all else."""
    for prefix, number in layers.items():
        if name == prefix or name.startswith(prefix + "."):
            return number
    return -1 if name.startswith("embedding") else AFTER_ALL_LAYERS


def worst_micro_batch(run: Run, computed: Computed) -> Culprit:
    """The micro-batch with the highest mean loss of all ranks; all ranks call it together."""
    targets = [max(float(batch.loss_mask.sum()), 1.0) for batch in computed.batches]
    means = [total / count for total, count in zip(computed.losses.sums, targets, strict=False)]
    mine = max(((mean, m) for m, mean in enumerate(means) if math.isfinite(mean)), default=(-math.inf, 0))
    answers = [mine] * run.process.info.world_size
    dist.all_gather_object(answers, mine)
    rank = max(range(len(answers)), key=lambda rank: (answers[rank][0], -rank))
    mean, m = answers[rank]
    holder: list[Any] = [documents_of(run, computed.number, [m]) if run.process.info.rank == rank else None]
    dist.broadcast_object_list(holder, src=rank)
    return Culprit(rank, (m,), f"a mean loss of {mean:.4g}", holder[0], how="the highest of its micro-batches:")
