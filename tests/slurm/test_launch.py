"""`joy launch slurm`: what is wrong is one line before anything queues; what is submitted says what was asked."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launch.slurm_site import load_site
from megatron_joy.cli.main import main
from megatron_joy.errors import UserError
from megatron_joy.recipe import Recipe, dump_recipe, load_recipe
from megatron_joy.runstate.lease import Lease
from tests.slurm_cluster import ROOT, Cluster
from tests.train.minuscule import EP2, make_home, recipe_tables

NASTY = "$(touch injected) `id`; \"'\\ #"
CPU = ("--gpus-per-node", "0", "--tasks-per-node", "1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and recipe."""
    return make_home(tmp_path_factory.mktemp("home"))


def joy(
    *arguments: str, environment: dict[str, str] | None = None, cwd: Path = ROOT
) -> "subprocess.CompletedProcess[str]":
    """`joy launch slurm`."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_joy.cli.main", "launch", "slurm", *arguments],
        env=(environment or dict(os.environ)) | {"PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def site(folder: Path, text: str) -> tuple[str, str]:
    """--site FILE."""
    path = folder / f"site_{hashlib.sha256(text.encode()).hexdigest()[:8]}.toml"
    path.write_text(text)
    return "--site", str(path)


FULL = f"""
account = "nlp"
partition = "main"
qos = "high"
time = "2-00:00:00"
signal_seconds = 600
sbatch = ["--exclusive", "--mem=0"]
modules = ["cuda/13.0", "openmpi"]
interface = "ib0"
[environment]
NASTY = {json.dumps(NASTY)}
[container]
kind = "pyxis"
image = "nvcr.io#nvidia/pytorch:26.05-py3"
mounts = ["/data:/data"]
"""


def test_what_is_rendered_is_clean_and_passes_values_on_unread(home: Path, tmp_path: Path) -> None:
    recipe = str(home / "minuscule.toml")
    nasty = (f"description={NASTY}", *EP2)
    done = joy(recipe, *nasty, "--nodes", "2", *CPU, "--render", *site(tmp_path, FULL))
    assert done.returncode == 0, done.stderr
    script = done.stdout
    directives = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"--account=nlp", "--partition=main", "--qos=high", "--time=2-00:00:00", "--exclusive", "--mem=0"} <= {
        *directives
    }
    assert {"--nodes=2", "--ntasks-per-node=1", "--signal=B:USR1@600", "--requeue"} <= {*directives}
    assert not any(line.startswith("--gpus-per-node") for line in directives)
    path = tmp_path / "rendered.sh"
    path.write_text(script)
    shellcheck = [str(Path(sys.executable).with_name("shellcheck")), "--exclude=SC2016", str(path)]
    assert subprocess.run(shellcheck, check=False).returncode == 0
    # Run it with programs that only say how they were called.
    told = tmp_path / "told"
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/bash\nprintf "%s\\n" "$NASTY" "$NCCL_SOCKET_IFNAME" "$@" > {told}\n')
    fake.chmod(0o755)
    path.write_text("module() { :; }\n" + script.replace(f"python={sys.executable}", f"python={fake}"))
    subprocess.run(["bash", str(path)], check=True, cwd=tmp_path)
    assert not (tmp_path / "injected").exists()
    words = told.read_text().splitlines()
    assert words[:4] == [NASTY, "ib0", "-m", "launch.in_slurm"]
    assert "--step-option=--container-image=nvcr.io#nvidia/pytorch:26.05-py3" in words
    command = words[words.index("--") + 1 :]
    assert command == ["python3", "-m", "megatron_joy.cli.main", "pretrain", recipe, *nasty]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('acount = "x"', "acount: no such key; known are account, partition"),
        ('partition = "a b"', "partition = 'a b'"),
        ('partition = "x\\n#SBATCH --uid=0"', "partition = "),
        ('sbatch = ["--wrap=$(id)"]', "sbatch.0 = "),
        ('[environment]\nHF_TOKEN = "hf_x"', "environment.HF_TOKEN: looks like a secret"),
        ('[environment]\n"A B" = "x"', "environment.A B"),
        ('[environment]\nA = "x\\ny"', "environment.A"),
        ("signal_seconds = 0", "signal_seconds = 0"),
        ('[container]\nkind = "docker"\nimage = "x"', "container.kind = 'docker'"),
        ("account = ", "not TOML"),
    ],
)
def test_a_site_file_with_a_mistake_is_refused_by_key(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        load_site(Path(site(tmp_path, text)[1]))
    assert says in str(refused.value)


Refused = Callable[[Path, Sequence[str]], str]


@pytest.fixture
def refused(slurm: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """The one line of a refusal, after which nothing is queued."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)

    def refuse(run: Path, arguments: Sequence[str]) -> str:
        before = slurm.run("squeue", "--noheader")
        code = main(["launch", "slurm", str(home / "minuscule.toml"), f"run.folder={run}", *arguments])
        said = capsys.readouterr().err
        assert (code, said.count("\n")) == (2, 1), said
        assert slurm.run("squeue", "--noheader") == before
        return said

    return refuse


def test_mistakes_are_one_line_and_nothing_is_queued_or_written(refused: Refused, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for arguments, says in (
        (["--nodes", "1", *CPU, *EP2], "1 processes, but the recipe's layout needs 2; ask for --nodes 2"),
        (["--nodes", "3", "--gpus-per-node", "2", *EP2], "6 processes, but the recipe's layout needs 2; ask for"),
        (["--gpus-per-node", "0"], "say how many ranks a node has with --tasks-per-node"),
        (["--nodes", "2", *CPU, *EP2, *site(tmp_path, 'partition = "nope"')], "invalid partition specified: nope"),
        (["--nodes", "2", *CPU, *EP2, *site(tmp_path, 'partition = "closed"')], "Access/permission denied"),
        (["--nodes", "2", *CPU, *EP2, *site(tmp_path, 'sbatch = ["--mem=900G"]')], "Slurm would not take the job"),
        ([*CPU, "data.train=[]"], "data.train: no source is given"),
        ([*CPU, 'data.train=[{manifest="gone"}]'], "gone/manifest.json"),
        ([*CPU, f"run.folder={tmp_path}/a b"], "rename it"),
        ([*CPU, "--chain"], "--chain: the recipe has no [[stages]]"),
        (["--gpus-per-node", "1", "--gpu", "h100"], "--gpu h100: not in the table of GPUs"),
    ):
        assert says in refused(run, arguments)
        assert not run.exists()


def test_another_recipes_run_and_a_live_run_are_refused(
    slurm: Cluster, home: Path, tmp_path: Path, refused: Refused
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(dump_recipe(load_recipe(str(home / "minuscule.toml"), [f"run.folder={run}"])))
    assert "model.hidden_size (32 -> 64)" in refused(run, [*CPU, "model.hidden_size=64"])
    lease = Lease(run, "launch 7 on elsewhere")
    assert lease.take() == 1
    said = refused(run, [*CPU])
    assert f"launch 7 on elsewhere (process {os.getpid()} on " in said
    assert "trains this run now; wait for it, stop it, or name a new folder" in said
    lease.release()
    done = joy(
        str(home / "minuscule.toml"),
        f"run.folder={run}",
        *CPU,
        "--json",
        *site(tmp_path, 'sbatch = ["--hold"]'),
        environment=slurm.environment,
    )
    assert done.returncode == 0, done.stderr
    (job,) = json.loads(done.stdout)["jobs"]
    assert slurm.state(job["id"]) == "PENDING"
    submission = json.loads((run / "launch" / "submission.json").read_text())
    assert submission["code"].keys() == {"commit", "changed_files"}
    assert submission["packages"]["pydantic"]
    kept = load_recipe(str(run / "launch" / "submitted.toml"))
    assert kept == load_recipe(str(home / "minuscule.toml"), [f"run.folder={run}"])
    assert f"job {job['id']} of this run is PENDING" in refused(run, [*CPU])
    slurm.run("scancel", job["id"])


def test_a_layout_that_cannot_fit_is_refused_unless_forced(tmp_path: Path) -> None:
    tables = recipe_tables(tmp_path)
    (tmp_path / "r.toml").write_text(dump_recipe(Recipe.model_validate(tables)))
    from launch.slurm import Request, _check_memory

    huge = load_recipe("joyai_48b_a3b", ["layout.expert_model_parallel_size=1"])
    request = Request("joyai_48b_a3b", [], 2, 8, None, load_site(None).model_copy(update={"gpu": "h100-80g"}))
    with pytest.raises(UserError, match=r"is too large by .* --force submits it all the same"):
        _check_memory(request, huge)
