"""What bad input gets: one clear line, exit code 2 on every rank, no traceback, nothing written or lost."""

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.data.tiny_shards import some_texts, write_shard_set
from tests.train.conftest import Unbroken
from tests.train.minuscule import EP2, ONE, Outcome, last_rows, make_home, numbers, signal_at, train
from tests.train.test_stop import TERM

Tree = dict[str, tuple[int, int, bytes]]


def tree(folder: Path) -> Tree:
    """Every file and folder below: (inode, modification time in ns, content)."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")) if folder.exists() else []:
        status = path.stat()
        found[str(path)] = (status.st_ino, status.st_mtime_ns, path.read_bytes() if path.is_file() else b"")
    return found


def the_one_line(ended: Outcome) -> str:
    """What a refused run says on each rank: the same single line."""
    assert set(ended.codes) == {2}
    lines = {text.strip() for text in ended.printed}
    assert len(lines) == 1
    (line,) = lines
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


@pytest.fixture
def own_home(tmp_path: Path) -> Path:
    """Data and recipe that a test may damage."""
    (tmp_path / "home").mkdir()
    return make_home(tmp_path / "home")


@pytest.fixture
def stopped(home: Path, tmp_path: Path) -> Path:
    """The folder of a run that was stopped after step 4."""
    train(home, tmp_path / "run", EP2, before=signal_at, inputs=(4, TERM))
    return tmp_path / "run"


def test_a_shard_that_lacks_a_byte_is_refused_before_training(own_home: Path, tmp_path: Path) -> None:
    shard = own_home / "letters" / "shard_00001.bin"
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    line = the_one_line(train(own_home, tmp_path / "run", EP2))
    assert "shard_00001.bin" in line
    assert str(shard.stat().st_size) in line
    assert str(shard.stat().st_size + 1) in line
    assert not (tmp_path / "run").exists()


def test_a_manifest_that_does_not_hold_is_refused_before_training(own_home: Path, tmp_path: Path) -> None:
    manifest = own_home / "letters" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokens"', '"tokenz"', 1))
    assert "manifest.json" in the_one_line(train(own_home, tmp_path / "run", EP2))
    assert not (tmp_path / "run").exists()


def test_sources_of_two_tokenizers_are_refused(own_home: Path, tmp_path: Path) -> None:
    shutil.rmtree(own_home / "digits")
    write_shard_set(own_home / "digits", some_texts(2, 60, seed=1), "digits", tokenizer="f" * 64)
    line = the_one_line(train(own_home, tmp_path / "run", EP2))
    assert "digits" in line
    assert "tokenizer ffffffffffff" in line
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_training_data_is_refused(home: Path, tmp_path: Path) -> None:
    line = the_one_line(train(home, tmp_path / "run", ONE, "data.train=[]"))
    assert "data.train" in line
    assert "[[data.train]]" in line
    assert not (tmp_path / "run").exists()


def test_a_world_that_is_not_the_layouts_is_refused_with_the_numbers(home: Path, tmp_path: Path) -> None:
    four = ("layout.data_parallel_size=4", "train.micro_batch_size=2")
    line = the_one_line(train(home, tmp_path / "run", ONE, *four))
    assert "TP 1 x CP 1 x PP 1 x DP 4 needs 4 processes, 1 were started" in line
    assert not (tmp_path / "run").exists()


def test_another_model_is_refused_with_the_keys_and_nothing_is_touched(home: Path, stopped: Path) -> None:
    before = tree(stopped)
    line = the_one_line(train(home, stopped, EP2, "model.hidden_size=64", "seed=8", "train.steps=9"))
    assert "seed (7 -> 8), model.hidden_size (32 -> 64)" in line
    assert "train.steps" not in line
    assert tree(stopped) == before


def test_other_data_under_the_same_path_is_refused_and_nothing_is_touched(own_home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(own_home, run, EP2, before=signal_at, inputs=(4, TERM))
    shutil.rmtree(own_home / "letters")
    write_shard_set(own_home / "letters", some_texts(2, 60, seed=9, longest=60), "letters")
    before = tree(run)
    assert "was trained on other data" in the_one_line(train(own_home, run, EP2))
    assert tree(run) == before


def test_other_sources_of_another_tokenizer_are_refused_in_mid_run_and_nothing_is_touched(
    own_home: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(own_home, run, ONE, before=signal_at, inputs=(4, TERM))
    write_shard_set(own_home / "new", some_texts(2, 60, seed=9, longest=60), "new", tokenizer="f" * 64)
    before = tree(run)
    line = the_one_line(train(own_home, run, ONE, f'data.train=[{{manifest="{own_home / "new"}"}}]'))
    assert "are tokenizer ffffffffffff's, whose ids mean other text; give shards of the run's" in line
    assert tree(run) == before


def test_a_folder_of_something_else_is_refused_and_not_touched(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter_1.tex").write_text("It was a dark and stormy night.")
    before = tree(folder)
    assert "other things in it" in the_one_line(train(home, folder, EP2))
    assert tree(folder) == before


def test_a_folder_that_cannot_be_made_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = the_one_line(train(home, tmp_path / "run", ONE, f"run.folder={tmp_path / 'file' / 'run'}"))
    assert "Not a directory" in line
    assert "run.folder" in line


def test_a_run_that_is_being_trained_is_refused_to_a_second_process(home: Path, stopped: Path) -> None:
    other = os.open(stopped, os.O_RDONLY)  # as the first process holds it
    fcntl.flock(other, fcntl.LOCK_EX)
    before = tree(stopped)
    assert "another process trains this run now" in the_one_line(train(home, stopped, EP2))
    assert tree(stopped) == before
    os.close(other)


def _weights_alone() -> None:
    """Checkpoints are written as conversion writes them: without optimizer and without the loop's state."""
    from megatron_joy.train.features import checkpointing

    save = checkpointing.save_checkpoint

    def then(folder: Path, step: int, **more: Any) -> Path:
        return save(folder, step, **more | {"optimizer": None, "state": {}})

    checkpointing.save_checkpoint = then


def test_weights_alone_are_not_taken_for_a_run_to_go_on_with(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(home, run, ONE, "train.steps=2", "schedule.decay_steps=0", before=_weights_alone)
    before = tree(run)
    assert "has weights only, no optimizer state: it can't be resumed from" in the_one_line(train(home, run, ONE))
    assert tree(run) == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_that_is_said(
    home: Path, stopped: Path, unbroken: Unbroken, damage: str
) -> None:
    newest = stopped / "checkpoints" / "step_00000004"
    tensors = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    if damage == "cut":
        with open(tensors, "r+b") as file:
            file.truncate(tensors.stat().st_size - 1)
    elif damage == "flipped":
        content = bytearray(tensors.read_bytes())
        content[len(content) // 2] ^= 1
        tensors.write_bytes(content)
    else:
        tensors.unlink()
    ended = train(home, stopped, EP2)
    assert set(ended.codes) == {0}
    (note,) = ended.told("note")
    assert note.startswith(f"checkpoint step_00000004 is not whole and is passed over: {tensors.name}: expected")
    assert note in ended.printed[0]
    assert ended.told("resume") == ["resumed from step_00000003 on 2 processes (EP2 DP2)"]
    assert numbers(last_rows(ended.rows)) == numbers(unbroken(EP2).rows)


def test_a_run_of_another_optimizer_is_not_gone_on_with(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(home, run, ONE, "train.steps=3", "schedule.decay_steps=0")
    told = the_one_line(train(home, run, ONE, "optimizer.name=muon"))
    assert 'optimizer.name ("adamw" -> "muon")' in told and "cannot resume" in told
    # Nor when the recipe was lost and only the checkpoints are left.
    (tmp_path / "other").mkdir()
    (run / "checkpoints").rename(tmp_path / "other" / "checkpoints")
    (tmp_path / "other" / "recipe.toml").write_text(
        (run / "recipe.toml").read_text().replace('name = "adamw"', 'name = "muon"')
    )
    told = the_one_line(train(home, tmp_path / "other", ONE, "optimizer.name=muon"))
    assert 'has the state of optimizer.name = "adamw", this run has "muon"' in told
