"""What must hold between the keys of [guards] and others; the rules of `validate`."""

from .dump import format_value
from .schema import Recipe
from .timetable import Timetable

SMALLEST_WINDOW = 4


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


def spike_window_is_reached(recipe: Recipe) -> str | None:
    """The first window of each stage is not judged: where no stage is longer, a guard that is to act never does."""
    guards = recipe.guards
    longest = max(stage.steps for stage in Timetable(recipe).stages)
    if guards.spike not in ("skip", "rollback") or longest > guards.spike_window:
        return None
    fix = 'guards.spike = "off"'
    if longest > SMALLEST_WINDOW:
        fix = f"guards.spike_window = {max(SMALLEST_WINDOW, longest // 2)}"
    return (
        f"guards.spike = {format_value(guards.spike)}: no update is ever judged, since a stage's first "
        f"guards.spike_window = {guards.spike_window} are not and the longest stage has {longest}; set {fix}"
    )


def rollback_reaches_back(recipe: Recipe) -> str | None:
    """Right after a checkpoint, too, one must be kept from before the span."""
    guards, checkpoint = recipe.guards, recipe.checkpoint
    back = (checkpoint.keep_last - 1) * checkpoint.interval  # over so many updates before the newest
    wanted = guards.spike_span - 1
    if guards.spike != "rollback" or not checkpoint.interval or checkpoint.keep_every or back >= wanted:
        return None
    return (
        f"guards.spike_span = {guards.spike_span}: checkpoint.keep_last = {checkpoint.keep_last} with "
        f"checkpoint.interval = {checkpoint.interval} may have none from before a span so long; set "
        f"checkpoint.keep_last = {-(-wanted // checkpoint.interval) + 1}"
    )
