"""Ranks of an MPI job convert as processes of one machine do: same bytes, one line for a mistake, kills survived."""

import hashlib
import subprocess
import sys
from pathlib import Path

from tests.convert.worlds import Reference

ROOT = Path(__file__).parents[2]
MPIEXEC = str(Path(sys.executable).with_name("mpiexec"))
PATIENCE_S = 300


def convert(ranks: int, *words: str, program: str = "megatron_joy.cli.main") -> "subprocess.CompletedProcess[str]":
    command = [MPIEXEC, "-n", str(ranks), sys.executable, "-m", program, "convert", *words, "--executor", "mpi"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def export(reference: Reference, out: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    words = ("to-hf", str(reference.checkpoint), "--out", str(out), "--max-shard-size", "200KB", "--no-verify")
    return convert(3, *words, **more)


def weights(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_ranks_export_the_bytes_of_one_process_and_go_on_after_a_rank_was_killed(
    reference: Reference, exported: Path, tmp_path: Path
) -> None:
    killed = export(reference, tmp_path / "hf", program="tests.convert.mpi_killed")
    assert killed.returncode != 0
    assert not (tmp_path / "hf").exists()

    again = export(reference, tmp_path / "hf")
    assert again.returncode == 0, again.stderr
    assert "an earlier start was interrupted" in again.stderr
    assert weights(tmp_path / "hf") == weights(exported)


def test_ranks_import_and_prove_what_one_process_does(exported: Path, tmp_path: Path) -> None:
    done = convert(2, "from-hf", str(exported), "--out", str(tmp_path / "ckpt"))
    assert done.returncode == 0, done.stderr
    assert "read back bit for bit" in done.stdout


def test_a_mistake_ends_every_rank_with_one_line(exported: Path, tmp_path: Path) -> None:
    done = convert(2, "from-hf", str(exported), "--out", str(tmp_path / "ckpt"), "--workers", "2")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: --workers: has no effect with --executor mpi, whose workers mpiexec starts; remove it"
    ]
    assert not list(tmp_path.iterdir())


def test_a_rank_that_fails_is_heard_after_the_others_have_finished() -> None:
    command = [MPIEXEC, "-n", "3", sys.executable, "-m", "tests.convert.mpi_sleeper"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (process.returncode, process.stdout.splitlines()) == (0, ["b: wrong", "a, c finished"]), process.stderr
