"""A recipe's optimizer: Megatron-core's distributed optimizer (ZeRO-1) around AdamW with fp32 master weights."""

from collections.abc import Sequence
from typing import Any

from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_joy.model.config import DTYPES
from megatron_joy.platform.process import Process
from megatron_joy.recipe.schema import Recipe


def build_optimizer(recipe: Recipe, process: Process, chunks: Sequence[Any]) -> MegatronOptimizer:
    """The optimizer of DDP-wrapped chunks; one-dimensional parameters (norms) get no weight decay.

    State is sharded over data-parallel ranks also when there is only one: checkpoints of all layouts have one form.
    """
    section, dtype = recipe.optimizer, DTYPES[recipe.precision.params_dtype]
    config = OptimizerConfig(
        optimizer="adam",
        lr=recipe.schedule.peak_lr,
        min_lr=recipe.schedule.final_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.betas[0],
        adam_beta2=section.betas[1],
        adam_eps=section.eps,
        clip_grad=section.clip_grad,
        bf16=recipe.precision.params_dtype == "bf16",
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False, pg_collection=process.groups)


def parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers inside: one for dense parameters and, with expert parallelism, one for the experts."""
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
