"""Ranks of a layout that is wrong in one place, for tests of whether a proof notices."""

import os
from typing import Any

import torch

from megatron_joy.checkpoint import load
from megatron_joy.model.backends import portable, portable_experts
from megatron_joy.prove import runs
from megatron_joy.prove.numbers import Papers, Run
from megatron_joy.recipe.schema import Recipe


def experts_reduced_like_dense_weights(recipe: Recipe, papers: Papers, before: int) -> Run:
    """Expert gradients summed over the dense data-parallel ranks, which hold other experts."""
    make = portable_experts.PortableGroupedExperts._parameter

    def marked(self: Any, *args: Any) -> torch.nn.Parameter:
        weight = make(self, *args)
        weight.allreduce = True  # type: ignore[attr-defined]
        return weight

    portable_experts.PortableGroupedExperts._parameter = marked  # type: ignore[method-assign]
    return runs.follow(recipe, papers, before)


def biases_forgotten(recipe: Recipe, papers: Papers, before: int) -> Run:
    """Router biases zero after the checkpoint was read."""
    read = load.load_checkpoint

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        state = read(*args, **kwargs)
        for chunk in kwargs["chunks"]:
            for name, buffer in chunk.named_buffers():
                if name.endswith("expert_bias"):
                    buffer.zero_()
        return state

    runs.load_checkpoint = forgetful
    return runs.follow(recipe, papers, before)


def norms_not_reduced(recipe: Recipe, papers: Papers, before: int) -> Run:
    """Under sequence parallelism each rank sees a part of the tokens; a norm's gradient must be summed over them."""
    make = portable.PortableNorm.__init__

    def unmarked(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    portable.PortableNorm.__init__ = unmarked  # type: ignore[method-assign]
    return runs.follow(recipe, papers, before)


def second_rank_fails(recipe: Recipe, papers: Papers, before: int) -> Run:
    """The others wait for it in a collective."""
    if os.environ["RANK"] == "1":
        raise MemoryError("no room for experts")
    return runs.follow(recipe, papers, before)
