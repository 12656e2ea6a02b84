"""The templates are clean shell, free of secrets, and accepted by Slurm as they are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm_cluster import ROOT, Cluster

SCRIPTS = sorted(path for path in (ROOT / "slurm").iterdir() if path.suffix in (".sbatch", ".sh"))
SECRET = re.compile(r"[a-z]_token|secret|password|api_?key", re.IGNORECASE)
SIZE = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")  # what the test's cluster has


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_template_passes_shellcheck(script: Path) -> None:
    command = [str(Path(sys.executable).with_name("shellcheck")), "--enable=all", "--exclude=SC2250,SC2312", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_template_says_how_it_is_called_and_holds_no_secret(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert re.search(rf"^#   (sbatch|bash) .*slurm/{script.name} ", text, re.MULTILINE)
    assert not SECRET.search(text)
    called = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False, timeout=120)
    assert called.returncode == 2
    assert called.stderr.startswith("usage: ")


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.suffix == ".sbatch"], ids=lambda path: path.name)
def test_slurm_would_run_a_template(slurm: Cluster, script: Path) -> None:
    done = subprocess.run(
        ["sbatch", "--test-only", *SIZE, str(script), "recipe"],
        env=slurm.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"Job \d+ to start at .* on nodes n", done.stderr)
    # Nothing after the first command is an option, whatever it looks like.
    body = script.read_text(encoding="utf-8").partition("set -euo pipefail")[2]
    assert "#SBATCH" not in body
