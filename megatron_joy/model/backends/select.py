"""Which backend a recipe gets on this machine."""

import importlib
from dataclasses import replace
from typing import Literal

import torch

from megatron_joy.errors import UserError
from megatron_joy.model.backends.blocks import Blocks


def transformer_engine_problem() -> str | None:
    """Why Transformer Engine can't be used here, or None. A half-installed one raises anything at import."""
    if not torch.cuda.is_available():
        return "no GPU is visible"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        return f"importing transformer_engine.pytorch failed: {type(error).__name__}: {error}"
    return None


def select_blocks(backend: Literal["auto", "portable", "te"], context_parallel_size: int = 1) -> Blocks:
    """The backend's blocks; 'auto' is Transformer Engine where it runs. Raises UserError when 'te' can't run here.

    Transformer Engine's context-parallel attention wants every document padded to a multiple of 2 x CP, which would
    make samples depend on the layout; with CP > 1 its blocks come with the portable core attention.
    """
    portable: Blocks = importlib.import_module("megatron_joy.model.backends.portable").BLOCKS
    if backend == "portable":
        return portable
    problem = transformer_engine_problem()
    if problem is not None:
        if backend == "te":
            raise UserError(f"model.backend: 'te' was asked for, but {problem}; use 'auto' or 'portable' here")
        return portable
    engine: Blocks = importlib.import_module("megatron_joy.model.backends.te").BLOCKS
    return engine if context_parallel_size == 1 else replace(engine, core_attention=portable.core_attention)
