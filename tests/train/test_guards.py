"""Bad numbers and spikes: what is left out, who is named, and that nothing else changes, not even after a kill."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_joy.data.trace import trace
from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.ledger import as_json, begin, follows, with_rollback
from megatron_joy.train.spikes import deviations
from tests.train.conftest import Unbroken
from tests.train.minuscule import (
    EP2,
    EP2_MUON,
    ONE,
    PP2,
    Outcome,
    Row,
    die,
    last_rows,
    make_staged_home,
    numbers,
    train,
)
from tests.train.test_bad_input import the_one_line
from tests.train.test_numbers import _spoil_before_step

ASYNCHRONOUS = "checkpoint.asynchronous=true"
MUON = ("optimizer.name=muon", "precision.params_dtype=bf16")
MARK = 263  # a token that no text of the tests has
MODULE = 3  # of the model, from 0: the experts of its second layer
SKIP = ("guards.nonfinite=skip", "train.micro_batch_size=2")
ROLLBACK = (
    "guards.spike=rollback",
    "guards.spike_window=4",
    "guards.spike_span=2",
    "train.steps=12",
    "checkpoint.keep_last=9",
)


def poison(
    sample: int, factor: float | None, die_at: tuple[int, int] | None = None, module_number: int = MODULE
) -> None:
    """Sample `sample` of the run, wherever it is read, spoils its micro-batch: a layer's output becomes NaN, or where a
    factor is given the loss so many times larger. die_at: (update, SIGKILL when it begins for the so many-th time).
    """
    from megatron_joy.data.stream import SampleStream
    from megatron_joy.train import forward
    from megatron_joy.train.step import Trainer

    read, make, sums = SampleStream.sample, Trainer.__init__, forward.loss_sums
    compute, marked, begun = Trainer.step, [False], [0]

    def marking(stream: Any, k: int) -> Any:
        found = read(stream, k)
        if k == sample:
            found.tokens[0] = MARK
        return found

    def note(module: Any, inputs: Any) -> None:
        marked[0] = bool((inputs[0] == MARK).any())

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        if not marked[0] or factor is not None:
            return output
        first, *rest = output if isinstance(output, tuple) else (output,)
        return (first * math.nan, *rest) if rest else first * math.nan

    def making(trainer: Any, recipe: Any, process: Any, chunks: Any) -> None:
        make(trainer, recipe, process, chunks)
        chunks[0].register_forward_pre_hook(note)
        for layer in chunks[0].decoder.layers:
            if layer.layer_number == module_number + 1:
                layer.register_forward_hook(spoil)

    def larger(*arguments: Any) -> Any:
        main, count, report = sums(*arguments)
        if factor is None or not marked[0]:
            return main, count, report
        return main * factor, count, report | {"main": report["main"] * factor}

    def dying(trainer: Any, number: int, batches: Any) -> Any:
        begun[0] += die_at is not None and number == die_at[0]
        if die_at is not None and begun[0] == die_at[1]:
            die()
        return compute(trainer, number, batches)

    SampleStream.sample = marking  # type: ignore[method-assign]
    Trainer.__init__ = making  # type: ignore[method-assign]
    forward.loss_sums = larger
    Trainer.step = dying  # type: ignore[method-assign]


def leave_out(update: int) -> None:
    """Update `update` is not even computed."""
    from megatron_joy.train.step import StepResult, Trainer

    compute = Trainer.step

    def then(trainer: Any, number: int, batches: Any) -> Any:
        if number == update:
            return StepResult(1.0, 1.0, None, 1.0, 0.0, 1, 1.0, None)
        return compute(trainer, number, batches)

    Trainer.step = then  # type: ignore[method-assign]


def killed(home: Path, run: Path, *overrides: str, inputs: tuple[Any, ...]) -> None:
    """A run that dies as `poison` arranges."""
    with pytest.raises(Exception, match="exit code -9"):
        train(home, run, EP2, *overrides, before=poison, inputs=inputs)


def ledger_of(run: Path) -> list[Row]:
    """ledger.json."""
    return json.loads((run / "ledger.json").read_text())


def events_of(ended: Outcome, kind: str) -> list[Row]:
    """The events of a kind."""
    return [event for event in ended.events if event["kind"] == kind]


def test_a_spike_is_told_by_median_and_median_deviation() -> None:
    generator = np.random.default_rng(5)
    for size in (4, 15, 128):
        window = generator.normal(3.0, 0.2, size)
        spread = np.median(np.abs(window - np.median(window))) / 0.6744897501960817
        expected = (4.0 - np.median(window)) / spread
        assert deviations(4.0, window.tolist()) == pytest.approx(expected, rel=1e-4)
    assert deviations(2.001, [2.0] * 8) == pytest.approx(0.5)  # equal numbers: a thousandth of the median is one
    assert deviations(9.0, [1.0, 1.1, 1.2, 500.0, 600.0][:4]) > 50  # a spike in the window hides no other


def test_an_update_that_is_left_out_changes_nothing_and_names_rank_layer_and_documents(
    home: Path, tmp_path: Path
) -> None:
    # Update 5 begins at sample 32; rank 1's second micro-batch of two has samples 38 and 39.
    run = tmp_path / "run"
    killed(home, run, *SKIP, inputs=(39, None, (6, 1)))
    # The fault is gone when the run goes on from step 3, before it: the ledger leaves update 5 out all the same.
    ended = train(home, run, EP2, *SKIP)
    assert ended.codes == [0, 0]
    reference = train(home, tmp_path / "reference", EP2, *SKIP, before=leave_out, inputs=(5,))
    pick = [row for row in numbers(reference.rows) if row[0] != 5]
    assert [row for row in numbers(last_rows(ended.rows)) if row[0] != 5] == pick
    assert ended.rows[4]["nonfinite"].keys() == {"loss", "grad_norm", "mtp_loss"}
    assert ended.rows[4]["refused"] == "the loss is nan"
    assert [entry["skipped"] for entry in ledger_of(run)] == [[5]]
    first, again = events_of(ended, "skip")
    assert (first["step"], first["rank"], first["micro_batches"]) == (5, 1, [1])
    assert first["where"] == f"the output of decoder.layers.{MODULE}"
    expected = {
        (row["source"], row["shard"], row["document"])
        for row in trace(run, 5, 1)
        if row["micro_batch"] == 1 and row["sample"] in (38, 39)
    }
    assert {(row["source"], row["shard"], row["document"]) for row in first["documents"]} == expected
    assert "the ledger says so" in again["message"]


def test_a_layer_on_another_pipeline_stage_has_its_number_in_the_whole_model(home: Path, tmp_path: Path) -> None:
    failed = train(home, tmp_path / "run", PP2, before=poison, inputs=(20, None, None, 5))
    assert failed.codes == [93, 93]
    (event,) = events_of(failed, "nonfinite")
    # Update 3 begins at sample 16, and its second micro-batch at sample 20.
    assert (event["step"], event["rank"], event["micro_batches"]) == (3, 1, [1])
    assert event["where"] == "the output of decoder.layers.5"
    (line,) = [line for line in failed.printed[0].splitlines() if line.startswith("error: ")]
    assert "step 3: the loss is nan; nothing of this step is saved" in line
    assert "first in the output of decoder.layers.5 on rank 1, micro-batch 1, with" in line


def test_a_rollback_leaves_the_spike_s_samples_out_and_is_reproducible(home: Path, tmp_path: Path) -> None:
    # Update 9 begins at sample 64 and rank 1 has 68 to 71. The span is updates 8 and 9, so step 6 is gone back to.
    run = tmp_path / "run"
    killed(home, run, *ROLLBACK, inputs=(70, 50.0, (8, 2)))  # before any checkpoint knows of it
    ended = train(home, run, EP2, *ROLLBACK, before=poison, inputs=(70, 50.0))
    assert ended.codes == [0, 0]
    (event,) = events_of(ended, "rollback")
    assert (event["step"], event["back_to"], event["left_out"]) == (9, 6, [8, 9])
    assert "; the highest of its micro-batches: a mean loss of " in event["message"]
    assert "on rank 1, micro-batch 0" in event["message"]
    first, second = ledger_of(run)
    assert (first["from_step"], first["from_sample"], first["reason"]) == (0, 0, "")
    assert (second["from_step"], second["from_sample"]) == (7, 72)
    # Update 8 has what update 10 would have had, and no later one has a sample of the two that were left out.
    assert [sorted({row["sample"] for row in trace(run, step)}) for step in (7, 8, 12)] == [
        list(range(48, 56)),
        list(range(72, 80)),
        list(range(104, 112)),
    ]
    fresh = train(home, tmp_path / "fresh", EP2, *ROLLBACK, f"guards.ledger={run / 'ledger.json'}")
    assert fresh.codes == [0, 0]
    assert numbers(fresh.rows) == numbers(last_rows(ended.rows))
    assert [row["sources"] for row in fresh.rows] == [row["sources"] for row in last_rows(ended.rows)]
    assert ended.checkpoints == fresh.checkpoints


def test_too_many_updates_in_a_row_stop_the_run(home: Path, tmp_path: Path) -> None:
    limit = ("guards.nonfinite=skip", "guards.max_skipped_in_a_row=2")
    failed = train(home, tmp_path / "run", EP2, *limit, before=_spoil_before_step, inputs=(4,))
    assert failed.codes == [93, 93]
    (line,) = [line for line in failed.printed[0].splitlines() if line.startswith("error: ")]
    assert "step 5: the loss is nan; first in the output of" in line
    assert "on rank 1" in line
    assert "2 updates are left out now (guards.max_skipped_in_a_row)" in line
    assert failed.checkpoints == ["step_00000003"]


def gradient_faults() -> None:
    """On rank 1: in update 3 one gradient is infinite whenever it is computed, in update 5 the loss is NaN once."""
    import os

    from megatron_joy.train import forward
    from megatron_joy.train.step import Trainer

    make, compute, sums, state = Trainer.__init__, Trainer.step, forward.loss_sums, {"update": 0, "faults": 1}

    def making(trainer: Any, recipe: Any, process: Any, chunks: Any) -> None:
        make(trainer, recipe, process, chunks)
        weight = dict(chunks[0].named_parameters())[PARAMETER]
        weight.register_hook(lambda grad: grad * math.inf if state["update"] == 3 else grad)

    def numbered(trainer: Any, number: int, batches: Any) -> Any:
        state["update"] = number
        return compute(trainer, number, batches)

    def once(*arguments: Any) -> Any:
        main, count, report = sums(*arguments)
        if state["update"] == 5 and state["faults"]:
            state["faults"] -= 1
            return main * math.nan, count, report | {"main": report["main"] * math.nan}
        return main, count, report

    if os.environ["RANK"] == "1":
        Trainer.__init__, Trainer.step = making, numbered  # type: ignore[method-assign]
        forward.loss_sums = once


PARAMETER = "decoder.layers.2.self_attention.linear_proj.weight"


def test_a_gradient_is_named_by_its_parameter_and_a_fault_that_does_not_come_again_as_a_machine_s(
    home: Path, tmp_path: Path
) -> None:
    ended = train(home, tmp_path / "run", EP2, "guards.nonfinite=skip", before=gradient_faults)
    assert ended.codes == [0, 0]
    gradient, machine = events_of(ended, "skip")
    assert (gradient["step"], gradient["rank"], gradient["where"]) == (3, 1, f"the gradient of {PARAMETER}")
    assert machine["step"] == 5
    assert "suspect a machine" in machine["message"]
    assert "rank" not in machine
    assert [row["loss"] is None for row in ended.rows] == [row["step"] == 5 for row in ended.rows]


def test_a_rollback_over_a_ramp_and_a_stage_s_border_follows_the_timetable(tmp_path: Path) -> None:
    """Updates 3 to 10 are left out: of a ramp without MTP, and of the stage after it with another blend."""
    home = make_staged_home(tmp_path)
    stages = ("stages.1.steps=8", "train.steps=15", *ROLLBACK[:2], "guards.spike_span=8", *MUON, ASYNCHRONOUS)
    # Batches of 4, 4, 8, 8 and from then on 8: update 10 begins at sample 64.
    ended = train(home, tmp_path / "run", ONE, *stages, before=poison, inputs=(66, 50.0))
    assert ended.codes == [0]
    (event,) = events_of(ended, "rollback")
    assert (event["step"], event["back_to"], event["left_out"]) == (10, 2, [3, 10])
    assert [(entry["from_step"], entry["from_sample"]) for entry in ledger_of(tmp_path / "run")] == [(0, 0), (2, 72)]
    fresh = train(home, tmp_path / "fresh", ONE, *stages, f"guards.ledger={tmp_path / 'run' / 'ledger.json'}")
    assert fresh.codes == [0]
    mine = last_rows(ended.rows)
    assert numbers(fresh.rows) == numbers(mine)
    for key in ("stage", "global_batch_size", "lr", "samples", "tokens", "sources"):
        assert [row[key] for row in fresh.rows] == [row[key] for row in mine]
    assert [row["stage"] for row in mine] == ["warmup"] * 4 + ["decay"] * 8 + ["long"] * 3
    assert [row["mtp_loss"] is None for row in mine] == [True] * 4 + [False] * 11


def test_a_ledger_of_another_recipe_is_refused_and_nothing_is_written(home: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(home / "minuscule.toml"))
    other = load_recipe(str(home / "minuscule.toml"), ["data.sequence_length=16"])
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps(as_json(with_rollback(begin(other), other, 2, 3, "a spike"))))
    assert not follows(with_rollback(begin(other), other, 2, 3, "a spike"), recipe)
    refused = train(home, tmp_path / "run", ONE, f"guards.ledger={path}")
    assert "its samples from update 2 on are of other stages, lengths or blends" in the_one_line(refused)
    assert not (tmp_path / "run").exists()


def _in_one_go() -> None:
    """Megatron-core's own step in place of our two halves."""
    from megatron_joy.train import step

    def both(optimizer: Any) -> float:
        return float(optimizer.step()[1])

    step.gradient_norm = both
    step.make_update = lambda optimizer, norm: None


def test_an_update_in_two_halves_has_the_bits_of_megatron_s_step(
    home: Path, tmp_path: Path, unbroken: Unbroken
) -> None:
    whole = train(home, tmp_path / "run", EP2_MUON, "optimizer.clip_grad=0.5", before=_in_one_go)
    halves = unbroken(EP2_MUON, "optimizer.clip_grad=0.5")
    assert max(row["grad_norm"] for row in halves.rows) > 0.5
    assert numbers(whole.rows) == numbers(halves.rows)
