"""What must hold between the keys of [guards] and others; the rules of `validate`."""

from .dump import format_value
from .schema import Recipe


def spike_signals(recipe: Recipe) -> str | None:
    """A look-out that looks at nothing."""
    guards = recipe.guards
    if guards.spike == "off" or guards.spike_loss or guards.spike_grad_norm:
        return None
    return (
        f"guards.spike = {format_value(guards.spike)}: nothing is looked at with guards.spike_loss = 0 and "
        f'guards.spike_grad_norm = 0; set guards.spike = "off"'
    )


def rollback_needs_checkpoints(recipe: Recipe) -> str | None:
    """Going back needs a place to go back to."""
    if recipe.guards.spike != "rollback" or recipe.checkpoint.interval:
        return None
    return (
        'guards.spike = "rollback": there is nothing to go back to with checkpoint.interval = 0; set '
        f"checkpoint.interval = {max(1, recipe.train.steps // 10)}"
    )
