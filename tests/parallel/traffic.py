"""Counts what a rank sends in one real training step, by kind of group."""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_joy.platform.process import Process
from megatron_joy.recipe.schema import Recipe

SMALL = 200  # bytes; counters, norms and losses are below
# Of n ranks, which share of its larger tensor a rank sends.
SHARES = {
    "allreduce_": lambda n: 2 * (n - 1) / n,
    "_allgather_base_": lambda n: (n - 1) / n,
    "allgather_": lambda n: (n - 1) / n,
    "allgather_into_tensor_coalesced_": lambda n: (n - 1) / n,
    "_reduce_scatter_base_": lambda n: (n - 1) / n,
    "reduce_scatter_": lambda n: (n - 1) / n,
    "reduce_scatter_tensor_coalesced_": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
}
GROUPS = {"tensor": ("tp",), "context": ("cp",), "pipeline": ("pp", "embd"), "data": ("intra_dp_cp", "intra_expt_dp")}


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


class Traffic(TorchDispatchMode):
    """Adds up each collective on its way to gloo: bytes that this rank sends, by the name of the group."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[tuple[str, str], float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._add(func.__name__.partition(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _add(self, operation: str, args: Any) -> None:
        found = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
        sizes = [size for arg in args if (size := _bytes(arg))]
        if not found or not sizes or max(sizes) < SMALL:
            return
        group = dist.ProcessGroup.unbox(found[0])
        if operation == "alltoall_base_":
            # What is given is the second tensor; the rows that stay here differ from layer to layer.
            sent = (group.size() - 1) / group.size() * sizes[1]
        elif operation in SHARES:
            sent = SHARES[operation](group.size()) * max(sizes)
        else:
            return
        key = group.group_name, operation
        self.sent[key] = self.sent.get(key, 0.0) + sent


def sent_in_a_step(recipe: Recipe) -> dict[str, float]:
    """Bytes that this rank sends in its second step, by kind; "expert" as if the load were even."""
    from megatron_joy.model.build import build_model
    from megatron_joy.platform import process as processes
    from megatron_joy.train.step import Trainer
    from tests.model.small import batch, row

    process = processes.start(recipe.layout, recipe.seed)
    trainer = Trainer(recipe, process, build_model(recipe, process))
    micro = recipe.train.micro_batch_size
    count = recipe.train.global_batch_size // recipe.layout.data_parallel_size // micro
    batches = [batch([row([], 1)] * micro) for _ in range(count)]
    trainer.step(1, batches)
    with Traffic() as traffic:
        trainer.step(2, batches)
    return _by_kind(traffic.sent, process)


def _by_kind(sent: dict[tuple[str, str], float], process: Process) -> dict[str, float]:
    """Stages gather the experts' load, for metrics alone: counters that are left out, as in the plan."""
    load = process.groups.pp.group_name, "_allgather_base_"
    # Of two stages that interleave, one direction goes through the group of all ranks.
    world = dist.group.WORLD
    assert world is not None
    names = {kind: {getattr(process.groups, name).group_name for name in GROUPS[kind]} for kind in GROUPS}
    names["expert"] = {process.groups.ep.group_name, process.groups.expt_tp.group_name}
    found = {
        kind: sum(size for key, size in sent.items() if key[0] in groups and key != load)
        for kind, groups in names.items()
    }
    found["pipeline"] += sent.get((world.group_name, "send"), 0.0)
    return {kind: value for kind, value in found.items() if value}
