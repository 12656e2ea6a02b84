"""Which backend a recipe gets on this machine."""

import importlib
from dataclasses import replace
from typing import Literal

import torch

from megatron_joy.errors import UserError
from megatron_joy.model.backends.blocks import Blocks
from megatron_joy.platform import cudnn
from megatron_joy.precision.delayed import History
from megatron_joy.precision.emulation import Emulation
from megatron_joy.recipe.schema import FP8_PARTS, Fp8Section, Recipe

# Compute capability that Transformer Engine's products want (its quantization.py, `check_*_support`).
FP8_DEVICES = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def transformer_engine_problem() -> str | None:
    """Why Transformer Engine can't be used here, or None. A half-installed one raises anything at import."""
    if not torch.cuda.is_available():
        return "no GPU is visible"
    try:
        cudnn.prefer_torchs()
        engine = importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        return f"importing transformer_engine.pytorch failed: {type(error).__name__}: {error}"
    return cudnn.mixed(engine.get_cudnn_version())


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


def history_of(fp8: Fp8Section) -> History | None:
    """What a resolved recipe's delayed scales look back on; None where each follows from its own tensor."""
    if fp8.recipe != "delayed":
        return None
    return History(fp8.amax_history_len or 1, fp8.amax_compute_algo, fp8.margin)


def emulation_of(fp8: Fp8Section) -> Emulation:
    """A recipe's scaling as the emulation takes it."""
    return Emulation(fp8.recipe, fp8.format or "e4m3", history_of(fp8))


def _device_problem(scaling: str) -> str | None:
    """Why this GPU can't multiply under a scaling, or None."""
    needed, found = FP8_DEVICES[scaling], torch.cuda.get_device_capability()
    if found >= needed:
        return None
    return f"needs compute capability {needed[0]}.{needed[1]}, this GPU has {found[0]}.{found[1]}"


def fp8_blocks(fp8: Fp8Section, blocks: Blocks) -> dict[str, Blocks]:
    """The parts of a model (`recipe.schema.FP8_PARTS`) whose blocks aren't `blocks`, under an FP8 recipe.

    Emulated, these are the parts with FP8. Transformer Engine has FP8 everywhere under Megatron-core's context, so
    there they are the parts without. Raises UserError where neither can be had.
    """
    if fp8.recipe == "off":
        return {}
    if fp8.emulate:
        emulated = importlib.import_module("megatron_joy.model.backends.emulated").emulated_blocks
        quantized: Blocks = emulated(emulation_of(fp8))
        return {part: quantized for part in FP8_PARTS if part not in fp8.high_precision}
    if blocks.name != "te":
        problem = transformer_engine_problem() or f"the backend is {blocks.name}"
        raise UserError(
            f'precision.fp8.recipe: "{fp8.recipe}" runs in Transformer Engine on a GPU, but {problem}; '
            "set precision.fp8.emulate = true for the same rounding in plain torch"
        )
    if (unfit := _device_problem(fp8.recipe)) is not None:
        raise UserError(
            f'precision.fp8.recipe: "{fp8.recipe}" {unfit}; choose another, or set precision.fp8.emulate = true for '
            "the same rounding in plain torch"
        )
    outside = importlib.import_module("megatron_joy.model.backends.te").without_fp8
    return {part: outside(blocks) for part in fp8.high_precision}


def blocks_of(recipe: Recipe) -> tuple[Blocks, dict[str, Blocks]]:
    """A recipe's blocks, and those of the parts that have others. Raises UserError where they can't run here."""
    fp8 = recipe.precision.fp8
    blocks = select_blocks("portable" if fp8.emulate else recipe.model.backend, recipe.layout.context_parallel_size)
    return blocks, fp8_blocks(fp8, blocks)
