"""Going on under another layout: exactly the same samples, and losses within 1e-5."""

import hashlib
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import Unbroken
from tests.train.minuscule import BATCH, EP2, ONE, PP2, Outcome, last_rows, read_lines, signal_at, train
from tests.train.test_stop import TERM

STOP = 4


def _note_samples(folder: Path, stop: int | None) -> None:
    """Every rank writes down the samples that it computes, step by step, and its place in the pipeline."""
    import json

    from megatron_joy.train.step import Trainer

    compute = Trainer.step

    def then(trainer: Any, number: int, batches: Any) -> Any:
        rows = [row.numpy().tobytes() for batch in batches for row in batch.tokens]
        noted = {
            "step": number,
            "stage": trainer.process.groups.pp.rank(),
            "samples": [hashlib.sha256(row).hexdigest() for row in rows],
        }
        with open(folder / f"rank_{os.environ['RANK']}.jsonl", "a") as file:
            print(json.dumps(noted), file=file)
        return compute(trainer, number, batches)

    Trainer.step = then  # type: ignore[method-assign]
    if stop is not None:
        signal_at(stop, TERM)


def samples(folder: Path) -> dict[int, list[str]]:
    """Step -> the samples of all its ranks, sorted; each pipeline stage has seen the same."""
    stages: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in folder.glob("rank_*.jsonl"):
        for row in read_lines(path):
            stages[row["step"]][row["stage"]] += row["samples"]
    for by_stage in stages.values():
        assert len({tuple(sorted(found)) for found in by_stage.values()}) == 1
    return {step: sorted(by_stage[0]) for step, by_stage in stages.items()}


@pytest.fixture(scope="module")
def reference(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """The samples of an unbroken run in one process."""
    folder = tmp_path_factory.mktemp("reference")
    assert train(home, folder / "run", ONE, before=_note_samples, inputs=(folder, None)).codes == [0]
    return samples(folder)


@pytest.mark.parametrize(
    ("first", "second"), [(EP2, ONE), (ONE, PP2), (PP2, EP2)], ids=["ep2 to one", "one to pp2", "pp2 to ep2"]
)
def test_another_layout_goes_on_with_the_same_samples(
    home: Path,
    tmp_path: Path,
    unbroken: Unbroken,
    reference: dict[int, list[str]],
    first: tuple[str, ...],
    second: tuple[str, ...],
) -> None:
    run = tmp_path / "run"
    assert set(train(home, run, first, before=_note_samples, inputs=(tmp_path, STOP)).codes) == {75}
    ended: Outcome = train(home, run, second, before=_note_samples, inputs=(tmp_path, None))
    assert set(ended.codes) == {0}
    seen = samples(tmp_path)
    assert seen == reference
    assert all(len(set(of_step)) == BATCH for of_step in seen.values())
    for mine, other in zip(last_rows(ended.rows), unbroken(ONE).rows, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["mtp_loss"] == pytest.approx(other["mtp_loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert (mine["sources"], mine["samples"], mine["tokens"]) == (
            other["sources"],
            other["samples"],
            other["tokens"],
        )
