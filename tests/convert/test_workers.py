"""However many processes there are, and however often they are killed, the bytes are those of one undisturbed one."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_joy.checkpoint.work_folder import Stopped, work_folder
from megatron_joy.convert import verify, workers
from megatron_joy.convert.export_job import ExportOptions
from megatron_joy.convert.from_hf import from_hf
from megatron_joy.convert.to_hf import to_hf
from megatron_joy.errors import UserError
from tests.convert.sleeper import Sleeper, open_sleeper
from tests.convert.worlds import Reference

FILE_BYTES = 300_000
OPTIONS: dict[str, Any] = {"max_shard_bytes": 200_000, "verify": False}


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of each file, the ones that tell the time of writing left out."""
    hidden = {"COMMITTED.json"}
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name not in hidden}


def imported(folder: Path) -> dict[str, str]:
    """The same of an import, without the report of what was compared."""
    return {name: digest for name, digest in contents(folder).items() if name != "joy_conversion.json"}


def silent(name: str, total: int | None) -> Callable[[int], None]:
    return lambda done: None


def test_two_processes_write_and_verify_the_bytes_of_one(exported: Path, reference: Reference, tmp_path: Path) -> None:
    told: dict[str, list[int]] = {}

    def phases(name: str, total: int | None) -> Callable[[int], None]:
        told[name] = [total or 0]
        return told[name].append

    options = ExportOptions(workers=2, max_shard_bytes=200_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "memory_problem", lambda plan: "not here")
        done = to_hf(reference.checkpoint, tmp_path / "hf", options, phases)
    assert done.workers == 2
    assert done.verification is not None
    assert done.verification.tensors == done.tensors
    for name in ("writing", "reading back"):
        total, *parts = told[name]
        assert sum(parts) == total == done.bytes, name
    one, two = contents(exported), contents(tmp_path / "hf")
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} == {"joy_conversion.json", "README.md"}  # the verification


def test_two_processes_import_the_bytes_of_one(whole_import: Path, exported: Path, tmp_path: Path) -> None:
    done = from_hf(exported, tmp_path / "ckpt", workers=2, file_bytes=FILE_BYTES)
    assert (done.workers, done.verified) == (2, True)
    assert len(list(whole_import.glob("*.distcp"))) > 2
    assert imported(tmp_path / "ckpt") == imported(whole_import)


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_joy.convert.export_job import ExportOptions
from megatron_joy.convert.from_hf import from_hf
from megatron_joy.convert.to_hf import to_hf

direction, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
left = {"to-hf": 300_000, "from-hf": 700_000}[direction]

def phases(name, total):
    def advance(done):
        global left
        left -= done
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return advance

if direction == "to-hf":
    to_hf(source, out, ExportOptions(max_shard_bytes=200_000, verify=False), phases)
else:
    from_hf(source, out, phases=phases, file_bytes=int(sys.argv[4]))
"""


def killed(direction: str, source: Path, out: Path) -> Path:
    """Runs a conversion that kills itself in the middle; returns the folder with the hidden one that it leaves."""
    command = [sys.executable, "-c", KILLED, direction, str(source), str(out), str(FILE_BYTES)]
    assert subprocess.run(command, check=False, cwd=Path(__file__).parents[2]).returncode == -signal.SIGKILL
    assert not out.exists()
    return out.parent


@pytest.fixture(scope="module")
def whole_import(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "ckpt"
    from_hf(exported, out, verify=False, file_bytes=FILE_BYTES)
    return out


@pytest.fixture(scope="module")
def killed_export(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed("to-hf", reference.checkpoint, tmp_path_factory.mktemp("killed") / "hf")


@pytest.fixture
def stopped(killed_export: Path, tmp_path: Path) -> Path:
    """A folder in which an export to `hf` was killed."""
    return shutil.copytree(killed_export, tmp_path / "stopped")


def test_a_killed_export_goes_on_from_its_whole_files(stopped: Path, exported: Path, reference: Reference) -> None:
    (left,) = stopped.glob(".hf.*/folder")
    (first,) = left.glob("model-00001*")
    before = first.stat().st_ino
    assert any(path.name.startswith(".model-00002") for path in left.iterdir())  # what it was in the middle of
    done = to_hf(reference.checkpoint, stopped / "hf", ExportOptions(**OPTIONS))
    assert contents(stopped / "hf") == contents(exported)
    assert (stopped / "hf" / first.name).stat().st_ino == before
    assert any("an earlier start was interrupted" in note for note in done.notes)
    assert [path.name for path in stopped.iterdir()] == ["hf"]


def test_a_kept_file_that_changed_is_written_again(stopped: Path, exported: Path, reference: Reference) -> None:
    (first,) = stopped.glob(".hf.*/folder/model-00001*")
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    to_hf(reference.checkpoint, stopped / "hf", ExportOptions(**OPTIONS))
    assert contents(stopped / "hf") == contents(exported)


def test_work_of_other_options_is_not_gone_on_with(stopped: Path, exported: Path, reference: Reference) -> None:
    done = to_hf(reference.checkpoint, stopped / "hf", ExportOptions(max_shard_bytes=150_000, verify=False))
    assert any("its work was thrown away" in note for note in done.notes)
    assert len(done.files) > len(list(exported.glob("*.safetensors")))
    assert {path.name for path in (stopped / "hf").glob("*.safetensors")} == set(done.files)


def test_what_is_there_already_is_not_counted_against_the_disk(
    stopped: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = sum(path.stat().st_size for path in stopped.glob(".hf.*/folder/*"))
    assert there > 0
    usage, spare = shutil.disk_usage(stopped), 64 << 20
    total = to_hf(reference.checkpoint, stopped / "other", ExportOptions(**OPTIONS)).bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=spare + total - there))
    with pytest.raises(UserError, match="free some or move"):
        to_hf(reference.checkpoint, stopped / "third", ExportOptions(**OPTIONS))
    to_hf(reference.checkpoint, stopped / "hf", ExportOptions(**OPTIONS))


def test_a_killed_import_goes_on_from_its_whole_files(whole_import: Path, exported: Path, tmp_path: Path) -> None:
    (left,) = killed("from-hf", exported, tmp_path / "ckpt").glob(".ckpt.*/folder")
    before = (left / "__0_0.distcp").stat().st_ino
    done = from_hf(exported, tmp_path / "ckpt", file_bytes=FILE_BYTES)
    assert done.verified
    assert (tmp_path / "ckpt" / "__0_0.distcp").stat().st_ino == before
    assert imported(tmp_path / "ckpt") == imported(whole_import)


def interrupted(folder: Path) -> None:
    """An error first, which is told; then both workers wait and one is killed."""
    with work_folder(folder / "out", {}) as work, workers.Workers(Sleeper(), open_sleeper, 2) as pool:
        work.keep("a", {"b": 1})
        (work.folder / "a").touch()
        with pytest.raises(UserError, match="x: wrong"):
            pool.each("fail", [("x",)], silent("", 0))
        pool.each("wait", [(folder / "1",), (folder / "2",)], silent("", 0))


def test_a_killed_worker_ends_the_work_with_one_line_and_keeps_what_is_finished(tmp_path: Path) -> None:
    def kill(pid: Path) -> None:
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        os.kill(int(pid.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill, args=(tmp_path / "1",), daemon=True)
    killer.start()
    with pytest.raises(Stopped, match="a worker ended with exit code -9"):
        interrupted(tmp_path)
    with work_folder(tmp_path / "out", {}) as work:
        assert work.record_of("a") == {"b": 1}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_two_conversions_into_one_folder_are_refused(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", {}):  # noqa: SIM117 - the second is refused inside the first
        with pytest.raises(UserError, match="out: another process is writing it"), work_folder(tmp_path / "out", {}):
            pass
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("asked", [0, -1])
def test_no_worker_is_no_number(asked: int) -> None:
    with pytest.raises(UserError, match=f"--workers {asked}: expected at least 1"):
        workers.workers_for(asked, 4, 10)


def test_small_models_and_single_files_take_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16))
    assert workers.workers_for(None, 20, 10**6) == 1
    assert workers.workers_for(None, 20, 10**11) == 4
    assert workers.workers_for(None, 2, 10**11) == 2
    assert workers.workers_for(16, 20, 10**6) == 16
