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
        (["guards.spike=rollback", "guards.spike_span=102"], "so long; set checkpoint.keep_last = 4"),
        (
            ["guards.spike=rollback", "guards.spike_window=300"],
            "the longest stage has 300; set guards.spike_window = 150",
        ),
        (["guards.spike=skip", "train.steps=128", "schedule.decay_steps=0"], "guards.spike_window = 128 are not"),
        (["guards.recheck_interval=301"], "has no effect with train.steps = 300, the run has fewer updates"),
        (["guards.statistics_interval=301"], "has no effect with train.steps = 300, the run has fewer updates"),
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
        ["guards.spike=rollback", "guards.spike_span=101"],
        ["guards.spike=rollback", "guards.spike_span=102", "checkpoint.keep_last=4"],
        ["guards.spike=rollback", "guards.spike_span=102", "checkpoint.keep_every=100"],
        ["guards.nonfinite=skip", "guards.max_skipped=7"],
        ["guards.spike=skip", "guards.max_skipped_in_a_row=1", "guards.spike_loss=0"],
        ["guards.spike=skip", "guards.spike_window=299", "guards.recheck_interval=300", "guards.statistics_interval=1"],
    ],
)
def test_what_works_together_is_taken(overrides: list[str]) -> None:
    load_recipe(BASE, overrides)


def test_the_window_is_held_against_the_longest_stage_and_its_fix_is_taken() -> None:
    with pytest.raises(UserError, match=r"the longest stage has 12; set guards.spike_window = 6$"):
        load_recipe("joyai_tiny_stages", ["guards.spike=skip"])
    load_recipe("joyai_tiny_stages", ["guards.spike=skip", "guards.spike_window=6"])


def test_a_ledger_that_is_not_there_or_not_one_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / LEDGER_FILE
    with pytest.raises(UserError, match=r"ledger\.json can't be read"):
        load_ledger(path)
    path.write_text("[{]")
    with pytest.raises(UserError, match=r"ledger\.json: not JSON"):
        load_ledger(path)
