"""statistics.jsonl: the gradient's norm and the activations' size of each layer, now and then."""

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_joy.checkpoint.contents import active_parts, unwrapped
from megatron_joy.data.batch import Batch
from megatron_joy.report.jsonl import JsonLines
from megatron_joy.report.layers import STATISTICS_FILE
from megatron_joy.train.blame import global_name, layer_names
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.run import Run
from megatron_joy.train.step import Computed, StepResult, Trainer

Sums = dict[str, list[float]]  # layer -> [sum of squares, largest size, values]


class Statistics(Feature):
    """Comes after the recheck, whose first pass is not the step's. A step that isn't due costs nothing.

    A row: step, attempt, and for each layer, by its name in the whole model, gradient_norm (of its parameters, before
    clipping; the root of their squares' sum is the step's grad_norm), and of its output over all tokens of the step rms
    and largest.
    """

    def __init__(self, run: Run, interval: int) -> None:
        self.interval = interval
        self._lines = JsonLines(Path(run.folder) / STATISTICS_FILE) if run.process.is_first_rank else None
        self._hooks = ExitStack()
        self._outputs: Sums = {}
        self._row: dict[str, Any] | None = None

    def _due(self, loop: Loop) -> bool:
        return loop.plan.number % self.interval == 0

    def before_forward(self, loop: Loop, batches: Sequence[Batch]) -> None:
        """Listens to every layer's output, in the step that is due."""
        if not self._due(loop):
            return
        self._outputs = defaultdict(lambda: [0.0, 0.0, 0.0])
        for chunk in unwrapped(loop.trainer.chunks):
            modules = dict(chunk.named_modules())
            for name, number in layer_names(chunk).items():
                hook = partial(self._add, f"{name.rpartition('.')[0]}.{number}")
                self._hooks.callback(modules[name].register_forward_hook(hook).remove)

    def _add(self, layer: str, module: Any, inputs: Any, output: Any) -> None:
        values: Tensor = (output[0] if isinstance(output, tuple | list) else output).detach().float()
        sums = self._outputs[layer]
        sums[0] += float(values.square().sum(dtype=torch.float64))
        sums[1] = max(sums[1], float(values.abs().max()))
        sums[2] += values.numel()

    def before_reduction(self, loop: Loop) -> None:
        """Stops listening."""
        self._hooks.close()

    def after_backward(self, loop: Loop, computed: Computed) -> None:
        """Gathers each rank's part; parts that ranks share are counted once, and all others are of different tokens."""
        if not self._due(loop):
            return
        mine = (gradient_squares(loop.trainer), dict(self._outputs))
        answers = [mine] * loop.run.process.info.world_size
        dist.all_gather_object(answers, mine)
        layers: dict[str, dict[str, float]] = defaultdict(dict)
        gradients = [{layer: [squares, 0.0, 0.0] for layer, squares in one.items()} for one, _ in answers]
        for layer, sums in _added(gradients).items():
            layers[layer]["gradient_norm"] = math.sqrt(sums[0])
        for layer, (squares, largest, count) in _added([outputs for _, outputs in answers]).items():
            layers[layer] |= {"rms": math.sqrt(squares / count), "largest": largest}
        self._row = {"step": computed.number, "attempt": loop.run.attempt, "layers": dict(layers)}

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Writes the row."""
        if self._row is not None and self._lines is not None:
            self._lines.append(self._row)
        self._row = None

    def close(self) -> None:
        """Closes the file."""
        self._hooks.close()
        if self._lines is not None:
            self._lines.close()


def _added(parts: Sequence[Sums]) -> Sums:
    found: Sums = {}
    for part in parts:
        for layer, (squares, largest, count) in part.items():
            before = found.get(layer, [0.0, 0.0, 0.0])
            found[layer] = [before[0] + squares, max(before[1], largest), before[2] + count]
    return found


def gradient_squares(trainer: Trainer) -> dict[str, float]:
    """Sums of squares of the gradients whose optimizer state this rank keeps, by layer; `prepare_grads` is done."""
    names: dict[int, str] = {}
    for chunk in unwrapped(trainer.chunks):
        layers = layer_names(chunk)
        names |= {id(param): _layer(global_name(name, layers)) for name, param in chunk.named_parameters()}
    found: dict[str, float] = defaultdict(float)
    for part in active_parts(trainer.optimizer):
        for param, (group, position) in part.model_param_group_index_map.items():
            main = part.optimizer.param_groups[group]["params"][position]
            # Megatron-core's own rule of what counts in the norm: nothing that another rank counts.
            for grad in part._filter_grads_for_norm([main]):
                found[names[id(param)]] += float(grad.square().sum(dtype=torch.float64))
    return dict(found)


def _layer(name: str) -> str:
    """`decoder.layers.3.mlp.router.weight` -> `decoder.layers.3`; of the rest the first part of the name."""
    parts = name.split(".")
    if "layers" in parts and parts[0] == "decoder":
        return ".".join(parts[: parts.index("layers") + 2])
    return parts[0]
