"""What a run reads of each source: tokens in every stage, when its text is read for the second time, and caps on that.

Tokens are those of the recipe's shares; the run's own order is within a sample of them (`data.blend`).
"""

from collections.abc import Iterator, Mapping
from fractions import Fraction

from megatron_joy.errors import UserError

from .schema import Recipe
from .timetable import Stage, Timetable


def shares_of(stage: Stage) -> dict[str, Fraction]:
    """Each source's share of a stage's tokens; they sum to 1."""
    total = sum(Fraction(repr(weight)) for _, weight in stage.blend)
    return {label: Fraction(repr(weight)) / total for label, weight in stage.blend}


def tokens_of(recipe: Recipe) -> dict[str, Fraction]:
    """Tokens that the whole run reads of each of its sources."""
    found = {source.label: Fraction(0) for source in recipe.data.train}
    for stage in Timetable(recipe).stages:
        for label, share in shares_of(stage).items():
            found[label] += share * stage.tokens
    return found


def update_that_reads(recipe: Recipe, label: str, tokens: Fraction | int) -> int | None:
    """The update, from 1, that reads more than so many tokens of a source; None when none does."""
    timetable = Timetable(recipe)
    left = Fraction(tokens)
    for stage in timetable.stages:
        share = shares_of(stage).get(label, Fraction(0))
        if share * stage.tokens <= left:
            left -= share * stage.tokens
            continue
        samples = stage.first_sample + left / (share * stage.sequence_length)
        low, high = stage.first_step, stage.last_step  # updates done: at most `samples` after low, more after high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if timetable.samples_before(middle) <= samples else (low, middle)
        return high
    return None


def cap_problems(recipe: Recipe, available: Mapping[str, int]) -> Iterator[str]:
    """One line for each source that the recipe reads more often than its cap allows; available: tokens by label."""
    read = tokens_of(recipe)
    for number, source in enumerate(recipe.data.train):
        has = available.get(source.label)
        if source.max_epochs is None or not has:
            continue
        allowed, wanted = Fraction(repr(source.max_epochs)) * has, read[source.label]
        if wanted > allowed:
            update = update_that_reads(recipe, source.label, allowed)
            yield (
                f"data.train.{number}.max_epochs = {source.max_epochs:g}: the run reads {float(wanted):.4g} tokens of "
                f"{source.label}, {float(wanted / has):.3g} times its {has:,}, and passes the cap in update {update}; "
                f"give it at most {float(allowed):.4g} tokens, add text, or raise max_epochs"
            )


def check_caps(recipe: Recipe, available: Mapping[str, int]) -> None:
    """Raises UserError, one line for each cap that is exceeded."""
    problems = list(cap_problems(recipe, available))
    if problems:
        raise UserError("\n".join(problems))
