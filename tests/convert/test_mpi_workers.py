"""Ranks of an MPI job convert as processes of one machine do: same bytes, one line for a mistake, kills survived."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.convert.worlds import Reference

ROOT = Path(__file__).parents[2]
MPIEXEC = str(Path(sys.executable).with_name("mpiexec"))
PATIENCE_S = 120


def convert(ranks: int, *words: str) -> "subprocess.Popen[str]":
    command = [
        MPIEXEC,
        "-n",
        str(ranks),
        sys.executable,
        "-m",
        "megatron_joy.cli.main",
        "convert",
        *words,
        "--executor",
        "mpi",
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def export(reference: Reference, out: Path) -> "subprocess.Popen[str]":
    words = ("to-hf", str(reference.checkpoint), "--out", str(out), "--max-shard-size", "200KB", "--no-verify")
    return convert(3, *words)


def weights(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_ranks_export_the_bytes_of_one_process_and_go_on_after_a_rank_was_killed(
    reference: Reference, exported: Path, tmp_path: Path
) -> None:
    process = export(reference, tmp_path / "hf")
    deadline = time.monotonic() + PATIENCE_S
    while not list(tmp_path.glob(".hf.*/records/*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    ranks = [one for one in psutil.Process(process.pid).children(recursive=True) if "convert" in one.cmdline()]
    os.kill(ranks[-1].pid, signal.SIGKILL)
    assert process.wait(PATIENCE_S) != 0
    process.communicate()
    if (tmp_path / "hf").exists():
        pytest.fail("the export was over before the kill; make it larger")

    again = export(reference, tmp_path / "hf")
    _, errors = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, errors
    assert "an earlier start was interrupted" in errors
    assert weights(tmp_path / "hf") == weights(exported)


def test_ranks_import_and_prove_what_one_process_does(exported: Path, tmp_path: Path) -> None:
    process = convert(2, "from-hf", str(exported), "--out", str(tmp_path / "ckpt"))
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert "read back bit for bit" in output


def test_a_mistake_ends_every_rank_with_one_line(exported: Path, tmp_path: Path) -> None:
    process = convert(2, "from-hf", str(exported), "--out", str(tmp_path / "ckpt"), "--workers", "2")
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert errors.splitlines() == [
        "error: --workers: has no effect with --executor mpi, whose workers mpiexec starts; remove it"
    ]
    assert not list(tmp_path.iterdir())


def test_a_rank_that_fails_is_heard_after_the_others_have_finished() -> None:
    command = [MPIEXEC, "-n", "3", sys.executable, "-m", "tests.convert.mpi_sleeper"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (process.returncode, process.stdout.splitlines()) == (0, ["b: wrong", "a, c finished"]), process.stderr
