"""[guards]: a setting that does nothing, or has nothing to work with, is refused with one fix."""

from pathlib import Path

import pytest

from megatron_joy.errors import UserError
from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.ledger import LEDGER_FILE, load_ledger

BASE = "joyai_tiny"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["guards.spike=off", "guards.spike_window=64"], "guards.spike_window = 64: has no effect"),
        (["guards.spike=warn", "guards.spike_span=4"], "guards.spike_span = 4: has no effect"),
        (["guards.spike=skip", "guards.max_rollbacks=4"], "the run never goes back"),
        (["guards.max_skipped=7"], "no update is left out"),
        (["guards.straggler_interval=0", "guards.straggler_factor=2.0"], "ranks are not compared"),
        (["guards.spike_loss=0", "guards.spike_grad_norm=0"], 'set guards.spike = "off"'),
        (["guards.spike=rollback", "checkpoint.interval=0"], "there is nothing to go back to"),
        (["guards.spike_window=3"], "guards.spike_window"),
    ],
)
def test_what_does_nothing_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match="guards") as refused:
        load_recipe(BASE, overrides)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["guards.spike=rollback", "guards.spike_span=4", "guards.max_rollbacks=1", "checkpoint.interval=10"],
        ["guards.nonfinite=skip", "guards.max_skipped=7"],
        ["guards.spike=skip", "guards.max_skipped_in_a_row=1", "guards.spike_loss=0"],
    ],
)
def test_what_works_together_is_taken(overrides: list[str]) -> None:
    load_recipe(BASE, overrides)


def test_a_ledger_that_is_not_there_or_not_one_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / LEDGER_FILE
    with pytest.raises(UserError, match=r"ledger\.json can't be read"):
        load_ledger(path)
    path.write_text("[{]")
    with pytest.raises(UserError, match=r"ledger\.json: not JSON"):
        load_ledger(path)
