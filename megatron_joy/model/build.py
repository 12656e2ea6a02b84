"""A recipe's model on this process: its pipeline chunks, initialised independently of the layout."""

from collections.abc import Mapping

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_joy.model import mtp_loss
from megatron_joy.model.backends.blocks import Blocks
from megatron_joy.model.backends.select import blocks_of
from megatron_joy.model.config import transformer_config
from megatron_joy.model.init import initialize_parameters
from megatron_joy.model.pattern import layer_pattern
from megatron_joy.model.stack import stack_spec
from megatron_joy.platform.process import Process, is_first_stage, is_last_stage, select_virtual_stage
from megatron_joy.platform.replacements import DUPLICATED_LINEAR, FINAL_NORM, rebound
from megatron_joy.recipe.schema import Recipe


def build_chunks(
    recipe: Recipe,
    process: Process,
    config: MLATransformerConfig,
    blocks: Blocks,
    parts: Mapping[str, Blocks] | None = None,
) -> list[HybridModel]:
    """One uninitialised HybridModel per virtual pipeline stage of this rank; `parts` as in `stack_spec`."""
    mtp_loss.install()
    chunks = []
    duplicated = (parts or {}).get("attention", blocks).duplicated_linear
    with rebound({DUPLICATED_LINEAR: duplicated, FINAL_NORM: blocks.norm}):
        for stage in range(process.virtual_pipeline_size):
            virtual_stage = stage if process.virtual_pipeline_size > 1 else None
            if virtual_stage is not None:
                select_virtual_stage(virtual_stage)
            chunks.append(
                HybridModel(
                    config,
                    stack_spec(blocks, parts),
                    recipe.model.vocab_size,
                    recipe.model.max_position_embeddings,
                    hybrid_layer_pattern=layer_pattern(recipe),
                    pre_process=is_first_stage(virtual_stage),
                    post_process=is_last_stage(virtual_stage),
                    share_embeddings_and_output_weights=False,
                    position_embedding_type="rope",
                    pg_collection=process.groups,
                    vp_stage=virtual_stage,
                )
            )
    return chunks


def build_model(recipe: Recipe, process: Process) -> list[HybridModel]:
    """The initialised model: the same weights for the same seed in any layout (see `model.init`)."""
    blocks, parts = blocks_of(recipe)
    chunks = build_chunks(recipe, process, transformer_config(recipe), blocks, parts)
    for chunk in chunks:
        chunk.to(process.device)
    with torch.no_grad():
        initialize_parameters(chunks, recipe.seed, recipe.model.initializer_range, process.groups)
    return chunks
