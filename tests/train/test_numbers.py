"""What must not change the numbers, and what happens when they are none."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_joy.cli.main import HOPELESS, WORK_FAILED
from megatron_joy.recipe import load_recipe
from tests.gloo import run_world
from tests.train.conftest import Unbroken
from tests.train.minuscule import EP2, ONE, PP2, STEPS, at_step, last_rows, numbers, signal_at, train, validation
from tests.train.test_stop import TERM


@pytest.mark.parametrize("layout", [ONE, EP2, PP2], ids=["one", "ep2", "pp2"])
def test_validation_changes_no_bit_of_training(home: Path, unbroken: Unbroken, layout: tuple[str, ...]) -> None:
    with_validation = unbroken(layout, *validation(home, interval=3))
    assert numbers(with_validation.rows) == numbers(unbroken(layout).rows)
    assert [row["expert_load"] for row in with_validation.rows] == [r["expert_load"] for r in unbroken(layout).rows]
    validated = [row["step"] for row in with_validation.rows if "validation_loss" in row]
    assert validated == [3, 6, STEPS]


def _naive_validation(recipe_file: str, checkpoints: Path) -> tuple[float, float]:
    """Mean losses of the last checkpoint's weights on the first 16 validation samples, by the written-out model."""
    import torch

    from megatron_joy.checkpoint.load import choose, load_checkpoint
    from megatron_joy.data.stream import SampleStream
    from megatron_joy.model.build import build_model
    from megatron_joy.platform import process as platform
    from tests.model import naive

    recipe = load_recipe(recipe_file)
    process = platform.start(recipe.layout, recipe.seed)
    chunks = build_model(recipe, process)
    checkpoint = choose(checkpoints, process).checkpoint
    assert checkpoint is not None
    load_checkpoint(checkpoint, chunks=chunks, optimizer=None, process=process)
    weights = {name: tensor.detach() for name, tensor in [*chunks[0].named_parameters(), *chunks[0].named_buffers()]}
    stream = SampleStream(recipe.data, recipe.seed, "validation")
    rows = [torch.from_numpy(stream.sample(k).tokens) for k in range(16)]
    with torch.no_grad():
        found = naive.objective(rows, weights, recipe.model, stream.eod_id)
    return float(found.main_sum) / found.main_targets, float(found.mtp_sum) / found.mtp_targets


def test_the_validation_loss_is_the_mean_over_the_same_samples(home: Path, unbroken: Unbroken) -> None:
    ended = unbroken(ONE, *validation(home, interval=3))
    main, mtp = run_world(_naive_validation, 1, str(ended.run / "recipe.toml"), ended.run / "checkpoints")[0]
    assert ended.rows[-1]["validation_loss"] == pytest.approx(main, rel=2e-6)
    assert ended.rows[-1]["validation_mtp_loss"] == pytest.approx(mtp, rel=2e-6)
    for layout in (EP2, PP2):
        other = unbroken(layout, *validation(home, interval=3)).rows[-1]
        assert other["validation_loss"] == pytest.approx(main, rel=1e-5)
        assert other["validation_mtp_loss"] == pytest.approx(mtp, rel=1e-5)


def test_eight_micro_batches_of_one_are_one_of_eight(unbroken: Unbroken) -> None:
    short = ("train.steps=3", "schedule.decay_steps=0")
    small = unbroken(ONE, "train.micro_batch_size=1", *short)
    large = unbroken(ONE, "train.micro_batch_size=8", *short)
    for one, other in zip(small.rows, large.rows, strict=True):
        assert one["loss_tokens"] == other["loss_tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["mtp_loss"] == pytest.approx(other["mtp_loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)


def test_bf16_learns_and_resumes_with_the_same_bits(home: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    bf16 = "precision.params_dtype=bf16"
    reference = unbroken(EP2, bf16)
    assert reference.rows[-1]["loss"] < reference.rows[0]["loss"] - 1
    assert reference.rows[0]["loss"] == pytest.approx(unbroken(EP2).rows[0]["loss"], rel=1e-2)
    assert reference.rows[0]["loss"] != unbroken(EP2).rows[0]["loss"]
    stopped = train(home, tmp_path / "run", EP2, bf16, before=signal_at, inputs=(4, TERM))
    assert set(stopped.codes) == {75}
    ended = train(home, tmp_path / "run", EP2, bf16)
    assert set(ended.codes) == {0}
    assert numbers(ended.rows) == numbers(reference.rows)


def _spoil(trainer_of: list[Any], rank: int | None = None) -> None:
    import torch

    weight = next(iter(trainer_of[0].chunks[0].parameters()))
    with torch.no_grad():
        weight.view(-1)[0] = math.nan


def _spoil_before_step(step: int) -> None:
    """One weight on rank 1 becomes NaN just before an update."""
    from megatron_joy.train.step import Trainer

    trainers: list[Any] = []
    make = Trainer.__init__

    def then(trainer: Any, *arguments: Any) -> None:
        make(trainer, *arguments)
        trainers.append(trainer)

    Trainer.__init__ = then  # type: ignore[method-assign]
    at_step(step, lambda: _spoil(trainers), rank=1)


def _spoil_after_step(step: int) -> None:
    """One weight on rank 1 becomes NaN in an update whose loss and gradient norm are fine."""
    import os

    from megatron_joy.train.step import Trainer

    compute = Trainer.step

    def then(trainer: Any, number: int, batches: Any) -> Any:
        result = compute(trainer, number, batches)
        if number == step and os.environ["RANK"] == "1":
            _spoil([trainer])
        return result

    Trainer.step = then  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("before", "at", "said", "steps", "comes_again"),
    [
        (_spoil_before_step, 6, "step 6: the loss is nan; nothing of this step is saved", 6, True),
        (_spoil_after_step, 6, "step 6: the update made weights NaN or infinite; they are not saved", 6, False),
        (_spoil_after_step, 4, "step 5: the loss is nan; nothing of this step is saved", 5, True),
    ],
    ids=["before a step", "in a step with a checkpoint", "in a step without one"],
)
def test_numbers_that_are_none_stop_the_run_and_are_not_saved(
    home: Path,
    tmp_path: Path,
    unbroken: Unbroken,
    before: Callable[[int], None],
    at: int,
    said: str,
    steps: int,
    comes_again: bool,
) -> None:
    failed = train(home, tmp_path / "run", EP2, before=before, inputs=(at,))
    assert failed.codes == [HOPELESS if comes_again else WORK_FAILED] * 2
    (line,) = [line for line in failed.printed[0].splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in failed.printed[0]
    assert len(failed.rows) == steps
    assert failed.checkpoints == ["step_00000003"]
    assert said in failed.told("error")[0]
    ended = train(home, tmp_path / "run", EP2)  # nothing spoils it now
    assert ended.codes == [0, 0]
    assert numbers(last_rows(ended.rows)) == numbers(unbroken(EP2).rows)


def test_a_wild_learning_rate_ends_with_one_line(home: Path, tmp_path: Path) -> None:
    failed = train(home, tmp_path / "run", ONE, "schedule.peak_lr=1e30", "optimizer.clip_grad=0")
    assert failed.codes == [HOPELESS]
    (line,) = [line for line in failed.printed[0].splitlines() if line.startswith("error: ")]
    assert "lower schedule.peak_lr" in line
    rows = failed.rows
    assert "nonfinite" in rows[-1] or "weights NaN" in line
    assert not any("nonfinite" in row for row in rows[:-1])
