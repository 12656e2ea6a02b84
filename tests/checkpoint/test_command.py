"""`joy checkpoint`: what it prints and how it exits."""

import json
from pathlib import Path

import pytest

from megatron_joy.cli.checkpoint_command import age_text, size_text
from megatron_joy.cli.main import main
from tests.checkpoint.fakes import make_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        make_checkpoint(tmp_path / "checkpoints", step)
    return tmp_path


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def test_list_shows_step_size_layout_and_state(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step_00000002" / "__0_0.distcp").unlink()
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "EP2 DP2 on 2" in lines[1]
    assert "2.1 kB" in lines[1]
    assert lines[1].startswith("step_00000003")
    assert lines[1].endswith("whole")
    assert "not whole" in lines[2]


def test_list_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["whole"], row["bytes"], row["samples"]) for row in rows] == [
        (3, True, 2150, 12),
        (2, True, 2150, 8),
        (1, True, 2150, 4),
    ]


def test_verify_of_a_sound_run_exits_0(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("whole, 3 files, 2.1 kB") == 3


def test_verify_names_the_file_what_was_expected_and_what_was_found_and_exits_1(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _flip_a_byte(run / "checkpoints" / "step_00000002" / "__1_0.distcp")
    assert main(["checkpoint", "list", str(run)]) == 0  # sizes are right
    assert main(["checkpoint", "verify", str(run)]) == 1
    out, err = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if line.startswith("step_00000002: __1_0.distcp: expected blake3 ")]
    assert "found blake3 " in line
    assert err.splitlines()[-1].startswith("error: 1 of 3 checkpoints")


def test_a_checkpoint_outside_a_run_is_listed_and_verified_by_its_folder(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = (run / "checkpoints" / "step_00000002").rename(run / "imported")
    assert main(["checkpoint", "list", str(alone)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["checkpoint", "imported"]
    monkeypatch.chdir(alone)
    assert main(["checkpoint", "verify", "."]) == 0
    assert capsys.readouterr().out == "imported: whole, 3 files, 2.1 kB\n"
    _flip_a_byte(alone / "__1_0.distcp")
    assert main(["checkpoint", "verify", str(alone)]) == 1
    assert "imported: __1_0.distcp: expected blake3 " in capsys.readouterr().out
    torn = run / "checkpoints" / "step_00000003"
    (torn / "COMMITTED.json").unlink()
    assert main(["checkpoint", "verify", str(torn)]) == 1
    assert "step_00000003: COMMITTED.json: expected a whole marker" in capsys.readouterr().out


def test_verify_as_json_exits_1_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _flip_a_byte(run / "checkpoints" / "step_00000002" / "__1_0.distcp")
    assert main(["checkpoint", "verify", str(run), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["whole"] for row in rows] == [True, False, True]
    assert rows[1]["problems"][0]["file"] == "__1_0.distcp"


def test_prune_keeps_as_many_as_asked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "prune", str(run), "--keep-last", "2"]) == 0
    assert "removed: step_00000001" in capsys.readouterr().out
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]


def test_prune_refuses_to_keep_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "prune", str(run), "--keep-last", "0"]) == 2
    assert len(list((run / "checkpoints").iterdir())) == 3


def test_a_folder_that_is_no_run_is_refused_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1000, "1.0 kB"), (672e9, "672.0 GB"), (2e15, "2000.0 TB")]
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (59, "59 s"), (60, "1 min"), (7200, "2 h"), (200000, "2 d")]
)
def test_ages_for_people(seconds: float, text: str) -> None:
    assert age_text(seconds) == text
