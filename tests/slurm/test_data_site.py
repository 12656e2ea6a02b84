"""A data pipeline's jobs are told what the site file says, quoted, and nothing that is the ranks'."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm_site import data_script, load_site
from tests.data_pipeline.corpora import texts, write_jsonl, write_pipeline
from tests.slurm_cluster import ROOT

NASTY = "a 'b' \"c\" $(touch injected) `touch injected` ; touch injected # d"
SITE = f"""
account = "nlp"
partition = "gpu"
reservation = "r1"
time = "2-00:00:00"
signal_seconds = 600
cpus_per_task = 12
sbatch = ["--exclusive", "--mem=0"]
modules = ["python/3.12"]
interface = "ib0"
[environment]
NASTY = {json.dumps(NASTY)}
[data]
partition = "cpu"
qos = "long"
cpus_per_task = 8
sbatch = ["--mem=8G"]
"""
PYXIS = '[container]\nkind = "pyxis"\nimage = "nvcr.io#joy:1"\nmounts = ["/data:/data"]\npython = "python3.12"\n'
TEMPLATES = ("data_array.sbatch", "data_merge.sbatch")


def site_file(folder: Path, text: str) -> Path:
    path = folder / "site.toml"
    path.write_text(text)
    return path


def directives(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")}


@pytest.mark.parametrize("template", TEMPLATES)
def test_jobs_have_the_sites_options_and_their_own(tmp_path: Path, template: str) -> None:
    found = directives(data_script(load_site(site_file(tmp_path, SITE)), template))
    assert found >= {"--account=nlp", "--partition=cpu", "--qos=long", "--reservation=r1", "--mem=8G", "--requeue"}
    assert found >= {"--time=2-00:00:00", f"--cpus-per-task={8 if template == 'data_merge.sbatch' else 1}"}
    assert not {"--exclusive", "--mem=0", "--partition=gpu"} & found
    assert not any(option.startswith("--signal") for option in found)


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_a_site_file_a_template_keeps_its_options(template: str) -> None:
    assert directives(data_script(load_site(None), template)) == directives((ROOT / "slurm" / template).read_text())


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_rendered_job_is_clean_shell_and_passes_values_on_unread(tmp_path: Path, template: str) -> None:
    told, python = tmp_path / "told", tmp_path / "python"
    python.write_text(f'#!/bin/bash\nprintf "%s\\n" "$NASTY" "${{NCCL_SOCKET_IFNAME:-none}}" "$@" > {told}\n')
    python.chmod(0o755)
    site = load_site(site_file(tmp_path, f'python = "{python}"\n{SITE}'))
    path = tmp_path / "rendered.sh"
    path.write_text("#!/bin/bash\nmodule() { :; }\n" + data_script(site, template))
    shellcheck = [str(Path(sys.executable).with_name("shellcheck")), "--exclude=SC2016", str(path)]
    assert subprocess.run(shellcheck, check=False).returncode == 0
    words = ["p.toml", "read", "1", "1", NASTY] if template == "data_array.sbatch" else ["p.toml", NASTY]
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "0"}
    subprocess.run(["bash", str(path), *words], check=True, cwd=tmp_path, env=environment)
    assert not (tmp_path / "injected").exists()
    first, interface, *called = told.read_text().splitlines()
    assert (first, interface, called[0]) == (NASTY, "none", "-m")
    assert called.count(NASTY) == 1


@pytest.mark.parametrize(
    ("container", "command"),
    [
        (PYXIS, "(srun --ntasks=1 '--container-image=nvcr.io#joy:1' --container-mounts=/data:/data python3.12)"),
        (PYXIS.replace("pyxis", "apptainer"), "(apptainer exec --bind /data:/data 'nvcr.io#joy:1' python3.12)"),
    ],
)
def test_python_is_the_containers(tmp_path: Path, container: str, command: str) -> None:
    site = load_site(site_file(tmp_path, container))
    assert all(f"\npython={command}\n" in data_script(site, template) for template in TEMPLATES)


def run_joy(tmp_path: Path, *options: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """`joy data run` over a small corpus, with an sbatch that only keeps what it is given."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    calls = tmp_path / "calls"
    for name, lines in {
        "sbatch": f'printf "%s\\t" "$@" >> {calls}; echo >> {calls}; wc -l < {calls}',
        "squeue": "true",
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{lines}\n")
        (programs / name).chmod(0o755)
    write_jsonl(tmp_path / "in" / "a.jsonl", texts(100))
    pipeline = write_pipeline(tmp_path / "in", tmp_path / "out")
    return subprocess.run(
        [sys.executable, "-m", "megatron_joy.cli.main", "data", "run", str(pipeline), *options],
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": ":".join(sys.path), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


def test_what_is_submitted_is_filled_in_from_the_site_file_or_joy_site(tmp_path: Path) -> None:
    site = str(site_file(tmp_path, SITE))
    done = run_joy(tmp_path, "--executor", "slurm", "--site", site)
    assert done.returncode == 1  # this Slurm runs nothing
    assert "its jobs have ended" in done.stderr
    jobs = [line.split("\t") for line in (tmp_path / "calls").read_text().splitlines()]
    scripts = [next(word for word in job if word.endswith(".sbatch")) for job in jobs]
    assert [Path(script).name for script in scripts] == [TEMPLATES[0]] * (len(jobs) - 1) + [TEMPLATES[1]]
    assert all("--partition=cpu" in directives(Path(script).read_text()) for script in scripts)
    assert all(f"--dependency=afterok:{number}" in job for number, job in enumerate(jobs[1:], 1))
    before = Path(scripts[0]).read_text()
    (tmp_path / "calls").unlink()
    assert run_joy(tmp_path, "--executor", "slurm", JOY_SITE=site).returncode == 1
    assert Path(scripts[0]).read_text() == before


@pytest.mark.parametrize(
    ("options", "text", "says"),
    [
        (["--executor", "slurm"], 'acount = "x"', "acount: no such key; known are account"),
        (["--executor", "slurm"], '[data]\nsbatch = ["--wrap=$(id)"]', "data.sbatch.0 = "),
        (["--executor", "local"], "", "has no effect with --executor local; remove it"),
    ],
)
def test_a_mistake_is_one_line_and_submits_nothing(tmp_path: Path, options: list[str], text: str, says: str) -> None:
    done = run_joy(tmp_path, *options, "--site", str(site_file(tmp_path, text)))
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "calls").exists()
