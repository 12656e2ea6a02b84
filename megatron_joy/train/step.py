"""One optimizer step: forward and backward over the step's micro-batches, reductions, update, numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_joy.data.batch import Batch
from megatron_joy.model.balance import balanced
from megatron_joy.model.rope import set_rotary_base
from megatron_joy.model.scales import ScaleKeeper
from megatron_joy.optim.build import build_optimizer, parts, set_learning_rate
from megatron_joy.optim.layout import buffer_layout
from megatron_joy.optim.update import gradient_norm, make_update
from megatron_joy.platform.process import Process
from megatron_joy.recipe.schema import Recipe
from megatron_joy.recipe.timetable import Stage, Timetable
from megatron_joy.train.forward import MicroBatch, forward_step
from megatron_joy.train.phases import COMMUNICATION, OPTIMIZER, Phases, Timers
from megatron_joy.train.router_load import RouterLoad


@dataclass(frozen=True)
class StepResult:
    """Numbers of one step, equal on all ranks. `expert_load` [moe layers, experts] is on rank 0, None elsewhere."""

    loss: float
    mtp_loss: float | None
    balance_loss: float | None  # the sequence-wise one, its factor included
    grad_norm: float
    learning_rate: float
    loss_tokens: int
    keys_per_token: float  # positions that a token attends to, on average
    expert_load: Tensor | None
    made: bool = True  # whether weights were updated

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Losses:
    """Means over the given samples, equal on all ranks; `sums`: this rank's main loss of each micro-batch, where it
    has the last pipeline stage, summed over its tokens.
    """

    main: float
    mtp: float | None
    tokens: int
    keys_per_token: float
    sums: tuple[float, ...] = ()


@dataclass(frozen=True)
class Computed:
    """Update `number` (from 1) before it is made: what it was computed from, and what came out."""

    number: int
    batches: Sequence[Batch]
    losses: Losses
    grad_norm: float


def _nobody(moment: str, *arguments: Any) -> None:
    """Who hears of a step that no loop runs."""


class Trainer:
    """A model, its optimizer and the way they are stepped. Collectives only; what is read or written is elsewhere."""

    def __init__(self, recipe: Recipe, process: Process, chunks: Sequence[Any]) -> None:
        self.recipe, self.process, self.timetable = recipe, process, Timetable(recipe)
        self.phases = Phases(process.device)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, average_in_collective=False
        )
        config = chunks[0].config
        self.chunks = [self._replicated(chunk, ddp, first=i == 0) for i, chunk in enumerate(chunks)]
        self.optimizer = build_optimizer(recipe, process, self.chunks)
        self.router_load = RouterLoad(chunks, process)
        self.scales = ScaleKeeper(recipe, process.groups, chunks)
        config.finalize_model_grads_func = self._finalize
        config.grad_scale_func = self.optimizer.scale_loss
        timers = Timers(self.phases)
        config.timers = timers
        for optimizer in (self.optimizer, *parts(self.optimizer)):
            optimizer.config.timers = timers
        config.no_sync_func = [c.no_sync for c in self.chunks] if len(self.chunks) > 1 else self.chunks[0].no_sync
        self.balance = balanced(chunks, recipe.model.sequence_balance_factor, process.groups)
        self.schedule = get_forward_backward_func()
        self.models = chunks
        self.tell: Callable[..., None] = _nobody  # the loop's: moments within a step
        self.refused: str | None = None  # why this step's update must not be made, from whoever heard of it
        self._with_mtp = recipe.model.num_nextn_predict_layers > 0

    def enter(self, stage: Stage) -> None:
        """Sets the model up for a stage; weights, optimizer state and router biases go on as they are.

        With a loss factor of 0 the MTP layer is left out: no computation, no gradient, no update.
        """
        config = self.models[0].config  # one for all chunks
        config.moe_router_bias_update_rate = stage.router_bias_update_rate
        config.mtp_loss_scaling_factor = stage.mtp_loss_factor
        self._with_mtp = self.recipe.model.num_nextn_predict_layers > 0 and stage.mtp_loss_factor > 0
        set_rotary_base(self.models, stage.rope_theta)

    def _replicated(self, chunk: Any, ddp: DistributedDataParallelConfig, first: bool) -> DistributedDataParallel:
        """A chunk whose gradients are reduced over data-parallel ranks, laid out as the distributed optimizer wants."""
        groups = self.process.groups
        layout = buffer_layout(chunk, groups, ddp, with_muon=self.recipe.optimizer.name == "muon")
        return DistributedDataParallel(
            chunk.config, ddp, chunk, disable_bucketing=not first, pg_collection=groups, full_param_layout=layout
        )

    def _finalize(self, *args: Any, **kwargs: Any) -> None:
        self.tell("before_reduction")
        self.router_load.collect()  # Megatron-core zeroes the counts when it updates the router biases
        kwargs["pg_collection"] = self.process.groups
        finalize_model_grads(*args, **kwargs)

    def step(self, number: int, batches: Sequence[Batch]) -> StepResult:
        """Runs update `number` (from 1) on this rank's micro-batches of the step.

        Computed in full but not made when somebody who hears of it sets `refused`: weights, optimizer state, router
        biases and FP8 scales then stay what they were.
        """
        self.refused = None
        rate = self.timetable.at(number).learning_rate
        set_learning_rate(self.optimizer, rate, self._with_mtp)
        biases, scales = self.router_load.biases(), self.scales.copies()
        self.tell("before_forward", batches)
        self._clear()
        losses = self._run(batches, forward_only=False)
        with self.phases(OPTIMIZER):
            grad_norm = gradient_norm(self.optimizer)
        self.tell("after_backward", Computed(number, batches, losses, grad_norm))
        if self.refused is None:
            with self.phases(OPTIMIZER):
                make_update(self.optimizer, grad_norm)
        else:
            self.router_load.put_back(biases)
            self.scales.put_back(scales)
        return StepResult(
            loss=losses.main,
            mtp_loss=losses.mtp,
            balance_loss=self._balance_loss(batches),
            grad_norm=grad_norm,
            learning_rate=rate,
            loss_tokens=losses.tokens,
            keys_per_token=losses.keys_per_token,
            expert_load=self.router_load.gather(),
            made=self.refused is None,
        )

    def _clear(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def compute_alone(self, batches: Sequence[Batch]) -> Losses:
        """Forward and backward on this rank's micro-batches without what follows; all ranks call it together.

        Gradients stay each rank's own sums, in `main_grad`; router biases, counters and FP8 scales stay what they were.
        """
        config, biases = self.models[0].config, self.router_load.biases()
        finalize, config.finalize_model_grads_func = config.finalize_model_grads_func, None
        try:
            self._clear()
            with self.scales.kept():
                return self._run(batches, forward_only=False)
        finally:
            config.finalize_model_grads_func = finalize
            self.router_load.put_back(biases)

    def weights_are_finite(self) -> bool:
        """Whether every weight on every rank is a number; the same answer on all ranks."""
        bad = torch.zeros(1, dtype=torch.int64, device=self.process.device)
        for chunk in self.chunks:
            for weight in chunk.parameters():
                bad += (~torch.isfinite(weight.detach())).any()
        dist.all_reduce(bad)
        return not bool(bad.item())

    @torch.no_grad()  # with gradients enabled the routers would count these tokens and move their biases by them
    def evaluate(self, batches: Sequence[Batch]) -> Losses:
        """Mean losses without touching weights, router biases, counters or FP8 scales."""
        for chunk in self.chunks:
            chunk.eval()
        try:
            with self.scales.kept():
                return self._run(batches, forward_only=True)
        finally:
            for chunk in self.chunks:
                chunk.train()

    def _run(self, batches: Sequence[Batch], forward_only: bool) -> Losses:
        with self.phases(COMMUNICATION):
            main_tokens, mtp_tokens, attended = self._global_counts(batches)
        weight = main_tokens / max(mtp_tokens, 1)
        rows = [MicroBatch(batch, weight) for batch in batches]
        self.scales.begin()
        several = len(self.chunks) > 1
        packed = self.process.groups.cp.size() == 1
        size, row = batches[0].tokens.shape
        samples = size * len(rows) * self.process.groups.dp.size()
        if self.balance is not None:
            self.balance.begin(size, row, main_tokens / samples, self.process.device)
        reports = self.schedule(
            forward_step_func=partial(forward_step, self.process, self._with_mtp),
            data_iterator=[iter(rows) for _ in self.chunks] if several else iter(rows),
            model=self.chunks if several else self.chunks[0],
            num_microbatches=len(rows),
            seq_length=row * size if packed else row,
            micro_batch_size=1 if packed else size,
            forward_only=forward_only,
        )
        with self.phases(COMMUNICATION):
            main, mtp = self._reduce(reports)
        return Losses(
            main=main / max(main_tokens, 1),
            mtp=mtp / max(mtp_tokens, 1) if self._with_mtp else None,
            tokens=main_tokens,
            keys_per_token=attended / (samples * row),
            sums=tuple(torch.stack([report["main"] for report in reports]).tolist()) if reports else (),
        )

    def _balance_loss(self, batches: Sequence[Batch]) -> float | None:
        """Mean over the step's rows of what the routers' balance loss added up to; None where there is none."""
        if self.balance is None:
            return None
        total = torch.as_tensor(self.balance.total, dtype=torch.float64, device=self.process.device)
        dist.all_reduce(total)  # every rank has tokens or layers of its own
        return float(total) / (len(batches[0].tokens) * len(batches) * self.process.groups.dp.size())

    def _global_counts(self, batches: Sequence[Batch]) -> tuple[int, int, int]:
        """Main targets, MTP targets, attended positions of the step over all data-parallel ranks, known before it."""
        counts = torch.tensor(
            [
                int(sum(b.loss_mask.sum() for b in batches)),
                int(sum(b.mtp_loss_mask.sum() for b in batches)),
                sum(b.attended for b in batches),
            ],
            dtype=torch.int64,
            device=self.process.device,
        )
        dist.all_reduce(counts, group=self.process.groups.dp)
        main, mtp, attended = counts.tolist()
        return main, mtp, attended

    def _reduce(self, reports: Sequence[dict[str, Tensor]]) -> tuple[float, float]:
        """Sums of losses over micro-batches, data- and context-parallel ranks; handed from the last stage to all."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.process.device)
        for report in reports:
            sums[0] += report["main"].double()
            sums[1] += report["mtp"].double() if "mtp" in report else 0.0
        groups = self.process.groups
        dist.all_reduce(sums, group=groups.dp_cp)
        dist.broadcast(sums, src=dist.get_global_rank(groups.pp, groups.pp.size() - 1), group=groups.pp)
        return float(sums[0]), float(sums[1])
