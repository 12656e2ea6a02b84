"""What prune removes and what it never does."""

from pathlib import Path

from megatron_joy.checkpoint.find import being_read, latest, open_checkpoint
from megatron_joy.checkpoint.marker import folder_name, unfinished_name
from megatron_joy.checkpoint.retention import Policy, prune
from tests.checkpoint.fakes import make_checkpoint


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _tear(folder: Path, step: int) -> None:
    (folder / folder_name(step) / "__0_0.distcp").write_bytes(b"")


def test_the_newest_stay_and_older_ones_go(tmp_path: Path) -> None:
    for step in range(1, 6):
        make_checkpoint(tmp_path, step)
    done = prune(tmp_path, Policy(2))
    assert _names(tmp_path) == [folder_name(4), folder_name(5)]
    assert done.kept == [folder_name(5), folder_name(4)]
    assert done.removed == [folder_name(3), folder_name(2), folder_name(1)]
    assert done.notes == []


def test_the_newest_whole_one_stays_when_all_newer_ones_are_torn(tmp_path: Path) -> None:
    for step in range(1, 5):
        make_checkpoint(tmp_path, step)
    for step in (3, 4):
        _tear(tmp_path, step)
    prune(tmp_path, Policy(1))
    # The torn newer ones stay to be looked at; they count for nothing.
    assert _names(tmp_path) == [folder_name(2), folder_name(3), folder_name(4)]
    found = latest(tmp_path, full=True).checkpoint
    assert found is not None
    assert found.step == 2


def test_torn_ones_older_than_what_stays_go(tmp_path: Path) -> None:
    for step in range(1, 4):
        make_checkpoint(tmp_path, step)
    _tear(tmp_path, 1)
    prune(tmp_path, Policy(2))
    assert _names(tmp_path) == [folder_name(2), folder_name(3)]


def test_nothing_whole_nothing_removed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    _tear(tmp_path, 1)
    assert prune(tmp_path, Policy(1)).removed == []
    assert _names(tmp_path) == [folder_name(1)]


def test_a_checkpoint_that_is_being_read_stays_and_it_is_said(tmp_path: Path) -> None:
    for step in (1, 2):
        make_checkpoint(tmp_path, step)
    with being_read(open_checkpoint(tmp_path / folder_name(1))):
        done = prune(tmp_path, Policy(1))
    assert done.removed == []
    assert done.notes == ["checkpoint step_00000001 stays: it is being read"]
    assert prune(tmp_path, Policy(1)).removed == [folder_name(1)]


def test_leftovers_of_earlier_attempts_go_and_those_of_the_present_one_stay(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    for attempt in (0, 1):
        (tmp_path / unfinished_name(2, attempt)).mkdir()
    prune(tmp_path, Policy(1), attempt=1)
    assert _names(tmp_path) == [unfinished_name(2, 1), folder_name(1)]


def test_without_an_attempt_the_newest_trace_is_taken_for_the_present_one(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1, attempt=2)
    for attempt in (1, 2):
        (tmp_path / unfinished_name(2, attempt)).mkdir()
    prune(tmp_path, Policy(1))
    assert _names(tmp_path) == [unfinished_name(2, 2), folder_name(1)]


def test_replaced_checkpoints_and_removals_cut_short_go(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 2, name=".step_00000002.replaced")
    make_checkpoint(tmp_path, 1, name=".step_00000001.removing")
    prune(tmp_path, Policy(1))
    assert _names(tmp_path) == [folder_name(2)]


def test_a_replaced_checkpoint_without_successor_stays(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 2, name=".step_00000002.replaced")
    prune(tmp_path, Policy(1))
    assert _names(tmp_path) == [".step_00000002.replaced"]


def test_a_run_without_checkpoints_is_no_error(tmp_path: Path) -> None:
    assert prune(tmp_path / "none", Policy(1)).removed == []


def test_multiples_and_the_best_stay_beside_the_last(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 3.0, 3: None, 4: 2.5, 5: 2.5, 6: 4.0, 7: 4.5, 8: 4.6}
    for step, loss in losses.items():
        make_checkpoint(tmp_path, step, validation_loss=loss)
    _tear(tmp_path, 6)  # a multiple of three, but torn and older than the last: nothing to keep
    done = prune(tmp_path, Policy(last=1, every=3, best=2))
    assert done.kept == [folder_name(8), folder_name(5), folder_name(4), folder_name(3)]
    assert done.removed == [folder_name(7), folder_name(6), folder_name(2), folder_name(1)]
    # Of two equally good ones the newer.
    assert prune(tmp_path, Policy(last=1, best=1)).kept == [folder_name(8), folder_name(5)]
    assert prune(tmp_path, Policy(last=1)).kept == [folder_name(8)]
