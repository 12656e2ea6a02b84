"""What a run reads of each source, held against adding it up update by update; caps are exact to a token."""

from fractions import Fraction
from itertools import pairwise

import pytest

from megatron_joy.errors import UserError
from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.schema import Recipe
from megatron_joy.recipe.timetable import Timetable
from megatron_joy.recipe.usage import check_caps, tokens_of, update_that_reads

NAME = "joyai_tiny_stages"


def read_after_each_update(recipe: Recipe, label: str) -> list[Fraction]:
    """Tokens of a source after 0, 1, 2, ... updates, from blends and batch sizes."""
    timetable = Timetable(recipe)
    found = [Fraction(0)]
    for number in range(1, timetable.steps + 1):
        plan = timetable.at(number)
        weights = {name: Fraction(repr(weight)) for name, weight in plan.stage.blend}
        share = weights.get(label, Fraction(0)) / sum(weights.values())
        found.append(found[-1] + share * plan.global_batch_size * plan.sequence_length)
    return found


@pytest.mark.parametrize("label", [source.label for source in load_recipe(NAME).data.train])
def test_a_source_is_read_as_often_as_its_updates_say(label: str) -> None:
    recipe = load_recipe(NAME)
    read = read_after_each_update(recipe, label)
    assert len(read) == Timetable(recipe).steps + 1
    assert tokens_of(recipe)[label] == read[-1] > 0
    for tokens in (0, read[1], read[1] - Fraction(1, 10**6), read[-1] / 3, read[-1] - 1, read[len(read) // 2]):
        assert update_that_reads(recipe, label, tokens) == next(n for n, total in enumerate(read) if total > tokens)
    assert update_that_reads(recipe, label, read[-1]) is None


def test_a_cap_refuses_one_token_too_many_and_names_the_update() -> None:
    recipe = load_recipe(NAME, ["data.train.0.max_epochs=2"])
    source = recipe.data.train[0].label
    needed = -(-tokens_of(recipe)[source] // 2)
    check_caps(recipe, {source: int(needed)})
    check_caps(recipe, {})
    read = read_after_each_update(recipe, source)
    last = max(number for number, (before, after) in enumerate(pairwise(read), 1) if after > before)
    with pytest.raises(UserError, match=rf"data\.train\.0\.max_epochs = 2: .* in update {last};"):
        check_caps(recipe, {source: int(needed) - 1})


def test_a_cap_on_validation_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.validation\.0\.max_epochs = 1: has no effect"):
        load_recipe("joyai_tiny", ["data.validation.0.max_epochs=1"])
