"""The learning rate of a step: warmup, stable, decay (WSD). A pure function, so a restart can't forget where it was."""

import math

from megatron_joy.recipe.schema import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of the `step`-th optimizer update, counted from 1 (arXiv 2604.03044, 2.4; cosine of stage 2).

    Linear from 0 over warmup_steps (the last of them has peak_lr), peak_lr, and over the last decay_steps of the run
    down to final_lr, which the last step has.
    """
    schedule = recipe.schedule
    if step < schedule.warmup_steps:
        return schedule.peak_lr * step / schedule.warmup_steps
    into_decay = step - (recipe.train.steps - schedule.decay_steps)
    if into_decay <= 0:
        return schedule.peak_lr
    progress = min(into_decay / schedule.decay_steps, 1.0)
    remaining = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}[schedule.decay_shape]
    return schedule.final_lr + (schedule.peak_lr - schedule.final_lr) * remaining
