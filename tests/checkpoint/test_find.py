"""A torn checkpoint is never chosen, and it is said; nobody needs torch to find out."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_joy.checkpoint.find import latest, open_checkpoint
from megatron_joy.checkpoint.marker import MARKER, MarkerProblem, read_marker, unfinished_name
from megatron_joy.errors import UserError
from tests.checkpoint.fakes import make_checkpoint


def _remove(path: Path) -> None:
    (path / "__1_0.distcp").unlink()


def _truncate(path: Path) -> None:
    file = path / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])


def _flip(path: Path, name: str = "__1_0.distcp") -> None:
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)


def _no_marker(path: Path) -> None:
    (path / MARKER).unlink()


def _half_marker(path: Path) -> None:
    text = (path / MARKER).read_text()
    (path / MARKER).write_text(text[: len(text) // 2])


def _altered_marker(path: Path) -> None:
    text = (path / MARKER).read_text()
    (path / MARKER).write_text(text.replace('"samples": 12', '"samples": 13'))


def _newer_format(path: Path) -> None:
    (path / MARKER).write_text((path / MARKER).read_text().replace('"format_version": 2', '"format_version": 9'))


def _other_name(path: Path) -> None:
    path.rename(path.with_name("step_00000004"))


TEARS: dict[Callable[[Path], None], tuple[str, str]] = {
    _remove: ("__1_0.distcp", "no such file"),
    _truncate: ("__1_0.distcp", "expected 1400 bytes, found 1399 bytes"),
    _flip: ("__1_0.distcp", "expected blake3"),
    _no_marker: (MARKER, "the save was not finished"),
    _half_marker: (MARKER, "can't be read"),
    _altered_marker: (MARKER, "digest"),
    _newer_format: (MARKER, "format_version 9, expected 2"),
    _other_name: (MARKER, "step 3"),
}


@pytest.mark.parametrize("tear", TEARS, ids=lambda tear: tear.__name__.strip("_"))
def test_a_torn_checkpoint_is_passed_over_for_the_newest_whole_one_and_the_note_says_why(
    tmp_path: Path, tear: Callable[[Path], None]
) -> None:
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    tear(tmp_path / "step_00000003")
    choice = latest(tmp_path, full=True)
    assert choice.checkpoint is not None
    assert choice.checkpoint.step == 2
    (note,) = choice.notes
    file, reason = TEARS[tear]
    assert "is not whole and is passed over" in note
    assert file in note
    assert reason in note
    assert "\n" not in note


@pytest.mark.parametrize("tear", [t for t in TEARS if t is not _flip], ids=lambda tear: tear.__name__.strip("_"))
def test_all_but_flipped_bytes_is_seen_without_reading_the_files(tmp_path: Path, tear: Callable[[Path], None]) -> None:
    make_checkpoint(tmp_path, 3)
    tear(tmp_path / "step_00000003")
    assert latest(tmp_path).checkpoint is None


def test_the_newest_whole_checkpoint_is_found_with_everything_it_says(tmp_path: Path) -> None:
    for step in (9, 10, 123456789):
        make_checkpoint(tmp_path, step)
    found = latest(tmp_path, full=True)
    assert found.checkpoint is not None
    assert found.notes == ()
    assert found.checkpoint.step == 123456789
    assert found.checkpoint.state == {
        "step": 123456789,
        "samples": 4 * 123456789,
        "best": 0.1 + 0.2,
        "validation_loss": None,
    }
    assert found.checkpoint.marker.samples == 4 * 123456789


def test_no_checkpoints_is_no_error(tmp_path: Path) -> None:
    assert latest(tmp_path / "none").checkpoint is None
    assert latest(tmp_path).checkpoint is None


def test_an_unfinished_save_is_no_checkpoint_even_with_its_marker_in_place(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2, name=unfinished_name(2, 0))
    found = latest(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1
    assert found.notes == ()


def test_a_replaced_checkpoint_counts_until_its_successor_is_there(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 2, attempt=0, name=".step_00000002.replaced")
    found = latest(tmp_path, full=True).checkpoint
    assert found is not None
    assert found.marker.attempt == 0
    make_checkpoint(tmp_path, 2, attempt=1)
    found = latest(tmp_path, full=True).checkpoint
    assert found is not None
    assert found.marker.attempt == 1


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/b", "..", ""])
def test_a_marker_cannot_name_a_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    path = make_checkpoint(tmp_path, 1)
    content = json.loads((path / MARKER).read_text())
    content["files"][0]["name"] = name
    (path / MARKER).write_text(json.dumps(content))
    with pytest.raises(MarkerProblem, match="not a plain file name"):
        read_marker(path)


def test_a_folder_that_is_asked_for_by_name_and_is_torn_is_refused_with_one_line(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1)
    assert open_checkpoint(path, full=True).step == 1
    _truncate(path)
    with pytest.raises(UserError, match=r"step_00000001 is not a whole checkpoint: __1_0.distcp: expected 1400 bytes"):
        open_checkpoint(path)
    with pytest.raises(UserError, match="no such folder"):
        open_checkpoint(tmp_path / "step_00000009")


def test_finding_verifying_and_pruning_need_no_torch() -> None:
    modules = ("find", "marker", "verify", "retention")
    imports = "; ".join(f"import megatron_joy.checkpoint.{name}" for name in modules)
    code = f"{imports}; import megatron_joy.cli.checkpoint_command, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
