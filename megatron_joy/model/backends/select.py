"""Which backend a recipe gets on this machine."""

import importlib
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


def select_blocks(backend: Literal["auto", "portable", "te"]) -> Blocks:
    """The backend's blocks; 'auto' is Transformer Engine where it runs. Raises UserError when 'te' can't run here."""
    if backend != "portable":
        problem = transformer_engine_problem()
        if problem is None:
            return importlib.import_module("megatron_joy.model.backends.te").BLOCKS
        if backend == "te":
            raise UserError(f"model.backend: 'te' was asked for, but {problem}; use 'auto' or 'portable' here")
    return importlib.import_module("megatron_joy.model.backends.portable").BLOCKS
