"""A minuscule model trained on text that is half pattern, half chance, so that drafts are often right, not always."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.convert.worlds import LENGTH, make_recipe

STEPS, ROWS = 60, 4


def pattern(rows: int, length: int, seed: int) -> npt.NDArray[np.int64]:
    """[rows, length]: counting up modulo 20, with a jump now and then."""
    generator = np.random.default_rng(seed)
    steps = np.where(generator.random((rows, length)) < 0.15, generator.integers(2, 19, (rows, length)), 1)
    return (steps.cumsum(axis=1) % 20 + 10).astype(np.int64)


def train_on_a_pattern(folder: Path) -> None:
    """On one rank: 60 updates, then a checkpoint `folder`/step_00000060."""
    from megatron_joy.platform import process as platform  # isort: skip - before anything of Megatron-core

    from megatron_joy.checkpoint.save import save_checkpoint
    from megatron_joy.data.batch import make_batch
    from megatron_joy.data.stream import Sample
    from megatron_joy.model.build import build_model
    from megatron_joy.recipe.schema import ScheduleSection
    from megatron_joy.train.step import Trainer

    recipe = make_recipe().model_copy(update={"schedule": ScheduleSection(peak_lr=1e-2, final_lr=1e-3, warmup_steps=5)})
    process = platform.start(recipe.layout, recipe.seed)
    trainer = Trainer(recipe, process, build_model(recipe, process))
    sample = Sample(np.zeros(0, dtype=np.int64), "pattern", 0, 0, 0, 0)
    for step in range(1, STEPS + 1):
        rows = [replace(sample, tokens=row) for row in pattern(ROWS, LENGTH + 1, step)]
        trainer.step(step, [make_batch([row], document_mask=True, eod_id=0) for row in rows])
    save_checkpoint(
        folder, STEPS, recipe=recipe, chunks=trainer.chunks, optimizer=None, process=process, state={"step": STEPS}
    )
