"""A checkpoint written beside training holds the bits of its own step, and never stands between a run and its end."""

import resource
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_joy.checkpoint import background, storage
from megatron_joy.checkpoint.background import BackgroundSaver
from megatron_joy.checkpoint.find import latest
from megatron_joy.checkpoint.save import Save
from tests.checkpoint import worlds
from tests.gloo import run_world


def _save(run: worlds.Run, folder: Path, step: int) -> Save:
    return Save(folder, step, 0, run.recipe, run.process, {"step": step, "samples": 0})


def _begin(saver: BackgroundSaver, run: worlds.Run, folder: Path, step: int) -> None:
    saver.begin(_save(run, folder, step), run.trainer.chunks, run.trainer.optimizer, lambda: [f"after {step}"])


def _hold(event: threading.Event) -> None:
    """Lets no rank write a byte of its tensors before the event."""
    original = background.write_image

    def write(*arguments: Any) -> Any:
        event.wait()
        return original(*arguments)

    background.write_image = write


def _train_on_while_it_is_written(folder: Path) -> Any:
    run, written = worlds.Run.start(worlds.recipe("ep2")), threading.Event()
    saver = BackgroundSaver(run.process)
    losses = run.train(1, 1)
    at_step_1 = run.boxes()
    _hold(written)
    _begin(saver, run, folder, 1)
    for step in (2, 3):
        losses += run.train(step, step)
        assert saver.poll() is None
    assert [path.name for path in folder.iterdir()] == [".step_00000001.writing-0"]
    if not run.process.is_first_rank:
        time.sleep(0.3)  # the other rank is done before this one
    written.set()
    outcome = saver.settle()
    assert outcome is not None
    assert (outcome.failure, outcome.notes) == (None, ("after 1",))
    assert saver.settle() is None
    _begin(saver, run, folder, 3)  # the same buffers and the same plan
    outcome = None
    while outcome is None:
        outcome = saver.poll()
    saver.close()
    return losses, at_step_1, run.boxes()


def _tell(folder: Path, step: int) -> Any:
    state, boxes, updates, losses = worlds.load_and_tell("ep2", folder / f"step_{step:08d}", more=4 - step)
    assert updates == state["step"] == step
    return boxes, losses


def _unbroken() -> Any:
    return worlds.Run.start(worlds.recipe("ep2")).train(1, 4)


def test_what_is_written_is_the_step_of_the_save_not_what_training_made_of_it_since(tmp_path: Path) -> None:
    ranks = run_world(_train_on_while_it_is_written, 2, tmp_path)
    unbroken = run_world(_unbroken, 2)[0]
    assert latest(tmp_path, full=True).notes == ()
    for step, held in ((1, [at for _, at, _ in ranks]), (3, [end for *_, end in ranks])):
        loaded = run_world(_tell, 2, tmp_path, step)
        expected, found = worlds.joined(held), worlds.joined([boxes for boxes, _ in loaded])
        assert expected.keys() == found.keys()
        assert [key for key in expected if not np.array_equal(expected[key], found[key])] == []
        assert loaded[0][1] == unbroken[step:]
    assert [losses for losses, *_ in ranks] == [unbroken[:3]] * 2


def _full_disk(folder: Path) -> Any:
    run = worlds.Run.start(worlds.recipe("ep2"))
    saver = BackgroundSaver(run.process)
    run.train(1, 1)
    _begin(saver, run, folder, 1)
    saver.settle()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.process.info.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    _begin(saver, run, folder, 2)
    failed = saver.settle()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    names = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    _begin(saver, run, folder, 3)  # there is room again
    last = saver.settle()
    assert failed is not None
    assert last is not None
    return failed.failure, names, last.failure


def test_a_disk_that_fills_beside_training_is_told_on_all_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    for failure, names, last in run_world(_full_disk, 2, tmp_path):
        assert failure == (
            f"checkpoint of step 2 was not written to {tmp_path}: rank 1: File too large; "
            "the last whole one is step_00000001"
        )
        assert names == ["step_00000001"]
        assert last is None
    assert latest(tmp_path, full=True).checkpoint.step == 3  # type: ignore[union-attr]


def _give_up(folder: Path) -> float:
    """Leaves in the middle of a file, as a rank does after an error."""
    run = worlds.Run.start(worlds.recipe("one"))
    saver = BackgroundSaver(run.process)
    amid = threading.Event()
    original = storage._HashedStream._write_chunk
    storage._CHUNK = 4096

    def write(stream: Any, chunk: memoryview) -> None:
        if stream.size > 100_000:
            amid.set()
            time.sleep(0.2)
        original(stream, chunk)

    storage._HashedStream._write_chunk = write  # type: ignore[method-assign]
    _begin(saver, run, folder, 1)
    assert amid.wait(60)
    began = time.perf_counter()
    saver.close()
    return time.perf_counter() - began


def test_giving_up_ends_the_writing_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    (seconds,) = run_world(_give_up, 1, tmp_path)
    assert seconds < 10  # the file alone would take a minute: 0.2 s for each of several hundred writes
    assert [path.name for path in tmp_path.iterdir()] == [".step_00000001.writing-0"]
    assert latest(tmp_path).checkpoint is None
