"""The doctor: exits 0 whatever it finds, and says what is half-installed or an impostor."""

import importlib
import json
from pathlib import Path

import pytest

from launch import doctor
from launch.doctor import Finding, Machine
from launch.probes import run_probe
from megatron_joy.cli import doctor_command
from megatron_joy.cli.main import main

NO_GPU = Machine({"devices": [], "built_for_cuda": "13.0", "gloo": True, "nccl": True}, None)
ONE_GPU = Machine({"devices": [{"name": "H100", "memory_gib": 79.6, "capability": "9.0"}]}, "580.1")


def finding(findings: list[Finding], name: str) -> Finding:
    (found,) = [row for row in findings if row.name == name]
    return found


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that this process and the probes import from first; an empty torch in it keeps the probes quick."""
    plant(tmp_path, "torch", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def plant(folder: Path, package: str, source: str, distribution: str | None = None) -> None:
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(source, encoding="utf-8")
    if distribution:
        info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    importlib.invalidate_caches()


@pytest.fixture(scope="module")
def examined() -> list[Finding]:
    """What the doctor finds here; asked once, since it imports torch in a child process."""
    return doctor.examine()


def test_the_doctor_exits_0_and_speaks_json(
    examined: list[Finding], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_command, "examine", lambda: examined)
    assert main(["doctor", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    names = {row["name"] for row in verdict["findings"]}
    assert names >= {"Python", "cores", "memory", "GPU", "Transformer Engine", "apex", "Slurm", "MPI"}
    assert verdict["healthy"] == (not any(row["matters"] for row in verdict["findings"]))


def test_the_doctor_prints_a_line_for_each_finding(
    examined: list[Finding], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_command, "examine", lambda: examined)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert all(row.name in printed and row.group in printed for row in examined)


def test_a_half_installed_transformer_engine_is_said_plainly(planted: Path) -> None:
    plant(planted, "transformer_engine", "raise FileNotFoundError('libtransformer_engine.so')", "transformer-engine")
    row = finding(list(doctor.transformer_engine_finding(NO_GPU)), "Transformer Engine")
    assert (row.state, row.matters) == ("wrong", True)
    assert row.found.startswith("half-installed (transformer-engine 1.0): FileNotFoundError: libtransformer_engine.so")
    assert "pip uninstall transformer-engine" in row.advice


def test_a_missing_transformer_engine_matters_only_with_a_gpu() -> None:
    without = finding(list(doctor.transformer_engine_finding(NO_GPU)), "Transformer Engine")
    assert (without.state, without.matters, without.advice) == ("missing", False, "")
    with_gpu = finding(list(doctor.transformer_engine_finding(ONE_GPU)), "Transformer Engine")
    assert (with_gpu.state, with_gpu.matters) == ("missing", True)
    assert ".[gpu]" in with_gpu.advice


def test_the_impostor_apex_is_told_from_nvidias(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(planted, "apex", "", "apex")
    row = finding(list(doctor.apex_finding(NO_GPU)), "apex")
    assert (row.state, row.matters) == ("wrong", True)
    assert row.found == "an unrelated project (apex 1.0, no amp_C)"
    (planted / "apex" / "optimizers.py").write_text("")
    assert "without its extensions" in finding(list(doctor.apex_finding(NO_GPU)), "apex").found
    (planted / "amp_C.py").write_text("")
    row = finding(list(doctor.apex_finding(NO_GPU)), "apex")
    assert (row.state, row.found) == ("ok", "NVIDIA's, with amp_C, apex.optimizers")


def test_a_driver_that_torch_cannot_use_is_a_problem() -> None:
    machine = Machine({"devices": [], "built_for_cuda": "13.0", "gloo": True, "nccl": True}, "525.60")
    row = finding(list(doctor.gpu_findings(machine)), "GPU")
    assert (row.state, row.matters) == ("wrong", True)
    assert "driver 525.60" in row.found


def test_a_torch_that_does_not_import_is_a_finding(planted: Path) -> None:
    (planted / "torch" / "__init__.py").write_text("raise RuntimeError('broken build')")
    machine = doctor.look_at_machine()
    assert machine.torch == {"error": "RuntimeError: broken build"}
    rows = [row for row in doctor.package_findings(machine) if row.name == "torch" and row.state == "wrong"]
    assert "does not import: RuntimeError: broken build" in rows[0].found


def test_slurm_is_found_by_asking_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "sbatch"
    tool.write_text("#!/bin/sh\necho slurm 22.05.8\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert finding(list(doctor.cluster_findings(NO_GPU)), "Slurm").found == "slurm 22.05.8"


def test_a_probe_that_dies_or_talks_is_still_answered() -> None:
    assert run_probe("print('noise'); print('{\"a\": 1}')") == {"a": 1}
    assert run_probe("import os; os.kill(os.getpid(), 9)") == {"error": "ended with -9"}
    assert run_probe("raise SystemExit(3)") == {"error": "ended with 3"}
