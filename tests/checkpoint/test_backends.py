"""A checkpoint doesn't depend on how a backend keeps its experts: stacked in two tensors, or one module per expert.

Transformer Engine's grouped experts are sharded as Megatron-core's SequentialMLP is: a tensor per expert, with an axis
for experts that the local tensor lacks, and '_extra_state' objects beside each weight.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoint import worlds
from tests.gloo import run_world


def _with_a_module_per_expert(layout: str) -> worlds.Run:
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megatron_joy.model.backends.portable import BLOCKS
    from megatron_joy.model.build import build_chunks
    from megatron_joy.model.config import transformer_config
    from megatron_joy.platform import process as platform
    from megatron_joy.train.step import Trainer

    recipe = worlds.recipe(layout)
    process = platform.start(recipe.layout, recipe.seed)
    linears = MLPSubmodules(linear_fc1=BLOCKS.column_linear, linear_fc2=BLOCKS.row_linear)
    blocks = replace(BLOCKS, name="sequential", grouped_experts=partial(SequentialMLP, submodules=linears))
    chunks = build_chunks(recipe, process, transformer_config(recipe), blocks)
    return worlds.Run(recipe, process, Trainer(recipe, process, chunks))


def _stacked(layout: str) -> worlds.Run:
    return worlds.Run.start(worlds.recipe(layout))


def _write(make: Callable[[str], worlds.Run], layout: str, folder: Path) -> Any:
    run = make(layout)
    run.disturb_randomly()
    run.train(1, 2)
    run.save(folder, 2)
    return run.boxes(), run.train(3, 3)


def _read(make: Callable[[str], worlds.Run], layout: str, path: Path) -> Any:
    run = make(layout)
    run.disturb()
    run.load(path)
    return run.boxes(), run.train(3, 3)


def _assert_same(
    folder: Path, writer: Callable[[str], worlds.Run], wrote: str, reader: Callable[[str], worlds.Run], reads: str
) -> None:
    before = run_world(_write, worlds.world_size(wrote), writer, wrote, folder)
    after = run_world(_read, worlds.world_size(reads), reader, reads, folder / "step_00000002")
    held, found = (worlds.joined([boxes for boxes, _ in ranks]) for ranks in (before, after))
    assert held.keys() == found.keys()
    assert [key for key in held if not np.array_equal(held[key], found[key])] == []
    np.testing.assert_allclose(before[0][1], after[0][1], rtol=1e-5)


def test_a_module_per_expert_reads_what_stacked_experts_wrote(tmp_path: Path) -> None:
    _assert_same(tmp_path, _stacked, "dp2", _with_a_module_per_expert, "ep2")


def test_stacked_experts_read_what_a_module_per_expert_wrote(tmp_path: Path) -> None:
    _assert_same(tmp_path, _with_a_module_per_expert, "ep2", _stacked, "tp2ep2")
