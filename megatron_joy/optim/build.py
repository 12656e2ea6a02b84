"""A recipe's optimizer: Megatron-core's distributed optimizer (ZeRO-1, fp32 master weights) around AdamW or Muon."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    _get_megatron_optimizer_based_on_param_groups,
    _get_param_groups,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_joy.errors import UserError
from megatron_joy.model.backends.select import transformer_engine_problem
from megatron_joy.model.config import DTYPES
from megatron_joy.optim.distributed import MuonDistributedOptimizer
from megatron_joy.optim.layout import ON_MUON
from megatron_joy.optim.muon import Muon, MuonSettings
from megatron_joy.optim.newton_schulz import triples
from megatron_joy.platform.process import Process
from megatron_joy.recipe.dump import format_value
from megatron_joy.recipe.schema import Recipe

OF_MTP = "of_mtp"  # marks the parameter groups of the MTP layer


def build_optimizer(recipe: Recipe, process: Process, chunks: Sequence[Any]) -> MegatronOptimizer:
    """The optimizer of DDP-wrapped chunks; one-dimensional parameters (norms) get no weight decay.

    State is sharded over data-parallel ranks also when there is only one: checkpoints of all layouts have one form.
    With Muon the chunks' buffers must be laid out for it (`layout.buffer_layout`).
    """
    section, dtype = recipe.optimizer, DTYPES[recipe.precision.params_dtype]
    narrow = section.moments_dtype != "fp32"
    if narrow and torch.cuda.is_available() and (problem := transformer_engine_problem()) is not None:
        raise UserError(
            f"optimizer.moments_dtype = {format_value(section.moments_dtype)}: on a GPU Transformer Engine's FusedAdam "
            f'keeps them so, but {problem}; set optimizer.moments_dtype = "fp32"'
        )
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
        **(_fused_adam(DTYPES[section.moments_dtype]) if narrow and torch.cuda.is_available() else {}),
    )
    if section.name == "muon":
        optimizer = _with_muon(muon_settings(recipe), config, process, list(chunks))
    else:
        optimizer = get_megatron_optimizer(
            config,
            list(chunks),
            config_overrides=_group_rules(config),
            use_gloo_process_groups=False,
            pg_collection=process.groups,
        )
    for part in parts(optimizer) if narrow else ():
        part.optimizer.exp_avg_dtype = DTYPES[section.moments_dtype]
    set_weight_decay(optimizer, section.weight_decay)
    return optimizer


def _fused_adam(dtype: torch.dtype) -> dict[str, Any]:
    """Megatron-core's precision-aware optimizer, for the moments alone.

    With a named FP8 recipe it keeps fp32 masters itself, as without the option, where else FusedAdam would have them
    under a form of its own; of the recipe it asks nothing else while weights are no FP8 tensors.
    """
    return {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": dtype,
        "exp_avg_sq_dtype": dtype,
        "store_param_remainders": False,
        "fp8_recipe": "tensorwise",
    }


def set_weight_decay(optimizer: MegatronOptimizer, decay: float) -> None:
    """Sets each group's weight decay."""
    for group in optimizer.param_groups:
        # Megatron-core marks norms with a factor of 0 and leaves it to a scheduler of its own to apply it.
        group["weight_decay"] = decay * group["wd_mult"]


def _group_rules(config: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Norms are a group of their own, and so is the MTP layer (twice: its norms)."""
    of_mtp = ParamWithNamePredicate(name=OF_MTP, fn=lambda parameter, name: "mtp." in name)
    marked = cast(ParamGroupOverride, {OF_MTP: True})
    return {**get_standard_config_overrides(config), ParamKey(with_name_predicate=of_mtp): marked}


def muon_settings(recipe: Recipe) -> MuonSettings:
    """What Muon needs of a recipe."""
    section = recipe.optimizer
    return MuonSettings(
        momentum=section.muon_momentum,
        nesterov=section.muon_nesterov,
        polynomials=triples(section.muon_coefficients, section.muon_steps),
        update_rms=section.muon_update_rms,
        dtype=DTYPES[section.muon_dtype or recipe.precision.params_dtype],
    )


def _with_muon(
    settings: MuonSettings, config: OptimizerConfig, process: Process, chunks: list[Any]
) -> MegatronOptimizer:
    """AdamW on what isn't Muon's, Muon on dense matrices and, where experts have ranks of their own, on theirs.

    Megatron-core chains optimizers the same way for dense weights and experts; the norm and its clipping are over all.
    """
    groups = _get_param_groups(chunks, config, _group_rules(config))

    def of(on_muon: bool, expert: bool) -> list[dict[str, Any]]:
        return [
            {**group, "params": [p for p in group["params"] if getattr(p, ON_MUON) == on_muon]}
            for group in groups
            if group["is_expert_parallel"] == expert
        ]

    optimizers = [
        _get_megatron_optimizer_based_on_param_groups(
            config,
            chunks,
            of(on_muon=False, expert=False),
            per_model_buffers={
                i: [b for b in chunk.buffers if not getattr(b.params[0], ON_MUON)] for i, chunk in enumerate(chunks)
            },
            data_parallel_group=process.groups.intra_dp_cp,
            data_parallel_group_idx=process.groups.mp.rank(),
            intra_dist_opt_group=process.groups.intra_dist_opt,
            pg_collection=process.groups,
        )
    ]
    for expert in (False, True):
        matrices = of(on_muon=True, expert=expert)
        if any(chunk.expert_parallel_buffers if expert else chunk.buffers for chunk in chunks) and matrices:
            muon = Muon(matrices, settings, lr=config.lr, weight_decay=config.weight_decay)
            optimizers.append(MuonDistributedOptimizer(muon, config, chunks, process, expert))
    return ChainedOptimizer(optimizers)


def parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers inside: for dense parameters, for experts where they have ranks of their own, by algorithm."""
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def set_learning_rate(optimizer: MegatronOptimizer, rate: float, with_mtp: bool = True) -> None:
    """Sets the learning rate of every parameter group; 0 for the MTP layer's without MTP.

    That layer gets no gradient then, and must neither shrink by weight decay nor drift: what momentum is left from a
    stage with MTP gives Muon updates of full size for a hundred steps and more.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate if with_mtp or not group.get(OF_MTP, False) else 0.0
