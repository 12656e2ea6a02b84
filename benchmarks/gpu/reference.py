"""The recipe's model from Megatron-core's own layer specification on Transformer Engine, under our settings."""

from dataclasses import replace
from typing import Any

import torch

from megatron_joy.model.backends.select import blocks_of
from megatron_joy.model.config import transformer_config
from megatron_joy.model.init import initialize_parameters
from megatron_joy.model.pattern import layer_pattern
from megatron_joy.model.stack import stack_spec
from megatron_joy.optim.build import parts
from megatron_joy.platform.process import Process
from megatron_joy.platform.replacements import DUPLICATED_LINEAR, FINAL_NORM, rebound
from megatron_joy.recipe import Recipe
from megatron_joy.train.step import Trainer


def megatron_stack() -> Any:
    """Megatron-core's hybrid specification, with norms of MLA's two latents.

    Its MLA layer has none, JoyAI has them: they are fused into the up projections, as in Megatron-core's GPT
    specification (`get_gpt_layer_with_transformer_engine_spec` with `qk_layernorm`).
    """
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear as Fused
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as stack

    layer = stack.submodules.mla_layer
    attention = layer.submodules.self_attention
    linears = replace(attention.submodules, linear_q_up_proj=Fused, linear_kv_up_proj=Fused)
    attention = replace(attention, submodules=linears)
    layer = replace(layer, submodules=replace(layer.submodules, self_attention=attention))
    return replace(stack, submodules=replace(stack.submodules, mla_layer=layer))


def reference_model(recipe: Recipe, process: Process) -> Any:
    """One HybridModel with the weights that `build_model` gives ours; where there is no Transformer Engine, of our
    portable blocks: Megatron-core's specification has no other form with MLA.

    Ours must have been built before, since that puts our MTP loss in its place for both.
    """
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    blocks, special = blocks_of(recipe)
    stack = megatron_stack() if blocks.name == "te" else stack_spec(blocks, special)
    duplicated = special.get("attention", blocks).duplicated_linear
    # With Transformer Engine both names stand for what they stand for anyway.
    with rebound({DUPLICATED_LINEAR: duplicated, FINAL_NORM: blocks.norm}):
        model = HybridModel(
            transformer_config(recipe),
            stack,
            recipe.model.vocab_size,
            recipe.model.max_position_embeddings,
            hybrid_layer_pattern=layer_pattern(recipe),
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            pg_collection=process.groups,
        )
    model.to(process.device)
    with torch.no_grad():
        initialize_parameters([model], recipe.seed, recipe.model.initializer_range, process.groups)
    return model


def reference_trainer(recipe: Recipe, process: Process) -> Trainer:
    """The reference in Megatron-core's data-parallel wrapper and distributed optimizer, untimed, for `bare_step`."""
    trainer = Trainer(recipe, process, [reference_model(recipe, process)])
    trainer.models[0].config.timers = None
    for optimizer in (trainer.optimizer, *parts(trainer.optimizer)):
        optimizer.config.timers = None
    return trainer
