"""What is written beside training is, byte for byte, the file that torch's writer makes in the step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_joy.checkpoint import image as image_module
from megatron_joy.checkpoint.background import BackgroundSaver
from megatron_joy.checkpoint.save import Save
from tests.checkpoint import worlds
from tests.gloo import run_world


def _both(folder: Path, layout: str, block: int) -> list[int]:
    """Two saves beside training, each with its twin in the step; sizes of the blocks of this rank's file."""
    image_module._BLOCK = block
    run = worlds.Run.start(worlds.recipe(layout))
    saver = BackgroundSaver(run.process)
    for update, step in ((1, 1), (2, 300)):  # the second with other elements, and a number that pickles into more bytes
        run.train(update, update)
        save = Save(folder / "beside", step, 0, run.recipe, run.process, {"step": step, "samples": 0})
        saver.begin(save, run.trainer.chunks, run.trainer.optimizer, list)
        saver.settle()
        run.save(folder / "within", step)
    saver.close()
    assert saver._agreed is not None
    return [block.nbytes for block in saver._agreed.image.blocks]


@pytest.mark.parametrize(("layout", "block"), [("ep2", 1 << 28), ("one", 50_000)])
def test_the_image_has_the_bytes_of_the_file_that_torch_writes(tmp_path: Path, layout: str, block: int) -> None:
    ranks = run_world(_both, 2 if layout == "ep2" else 1, tmp_path, layout, block)
    for step in (1, 300):
        beside, within = (tmp_path / kind / f"step_{step:08d}" for kind in ("beside", "within"))
        for rank, blocks in enumerate(ranks):
            written = (beside / f"__{rank}_0.distcp").read_bytes()
            assert written == (within / f"__{rank}_0.distcp").read_bytes()
            assert len(blocks) == 1 if block > len(written) else len(blocks) > 3
            if step == 300:
                assert sum(blocks) == len(written)
        assert (beside / ".metadata").read_bytes() == (within / ".metadata").read_bytes()


def _elsewhere(run: worlds.Run) -> Any:
    """A torch that writes elements from a copy of its own."""
    save = torch.save

    def copied(value: Any, *arguments: Any, **options: Any) -> None:
        save(value.clone() if isinstance(value, torch.Tensor) else value, *arguments, **options)

    torch.save = copied


def _refused(folder: Path) -> str:
    run = worlds.Run.start(worlds.recipe("one"))
    saver = BackgroundSaver(run.process)
    _elsewhere(run)
    save = Save(folder, 1, 0, run.recipe, run.process, {"step": 1, "samples": 0})
    with pytest.raises(Exception, match="in another form than its elements in order") as refused:
        saver.begin(save, run.trainer.chunks, run.trainer.optimizer, list)
    saver.close()
    assert list(folder.iterdir()) == []
    return type(refused.value).__name__


def test_a_torch_that_writes_elements_in_another_form_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    assert run_world(_refused, 1, tmp_path) == ["WorkError"]
