"""On a real Slurm: nodes that the preflight finds unfit are not trained on."""

import json
import re
import sys
from pathlib import Path

import pytest

from launch.slurm_preflight import unfit_nodes
from launch.slurm_site import Supervision
from launch.supervise import read_history
from megatron_joy.runstate import VERDICT_FILE
from tests.slurm_cluster import Cluster, wait_until


def run_job(slurm: Cluster, run: Path, nodes: int, unfit: list[str], *options: str) -> tuple[str, str]:
    """Submits two ranks with a preflight; (the job's id, what it printed)."""
    (run / "logs").mkdir(parents=True)
    script, listed = run / "script.json", run / "unfit.json"
    script.write_text(json.dumps([[["steps", 3], ["finish", 0]]] * 2))
    listed.write_text(json.dumps(unfit))
    rank = f"{sys.executable} -m tests.slurm.measured_rank pretrain {run} {script} {listed}"
    supervisor = f"{sys.executable} -m launch.in_slurm --run {run} --preflight {' '.join(options)}"
    batch, output = run.parent / "job.sbatch", run.parent / "job.out"
    batch.write_text(f"#!/bin/bash\nexec {supervisor} -- {rank}\n")
    asked = (f"--nodes={nodes}", "--ntasks-per-node=1", "--requeue", "--no-kill", "--open-mode=append")
    job = slurm.sbatch(*asked, f"--output={output}", str(batch))
    wait_until(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), 240, "the job's end")
    return job, output.read_text()


def test_a_spare_takes_the_place_of_an_unfit_node(slurm: Cluster, tmp_path: Path) -> None:
    job, printed = run_job(slurm, tmp_path / "run", 3, ["n2"], "--spares=1")
    assert slurm.state(job) == "COMPLETED", printed
    assert "preflight: n2 is left out: its clock is 9.0 s ahead" in printed
    assert "preflight: all nodes are fit" in printed
    (attempt,) = read_history(tmp_path / "run", f"Slurm job {job}")
    assert (attempt.outcome, attempt.done) == ("finished", 3)
    assert set(json.loads((tmp_path / "run" / VERDICT_FILE).read_text())["nodes"]) == {"n1", "n3"}


def test_without_a_spare_the_job_is_requeued_without_the_unfit_node(slurm: Cluster, tmp_path: Path) -> None:
    job, printed = run_job(slurm, tmp_path / "run", 2, ["n1"])
    assert slurm.state(job) == "COMPLETED", printed
    assert "preflight: the job is requeued without n1" in printed
    shown = slurm.run("scontrol", "show", "job", job, "--oneliner")
    assert " Restarts=1 " in shown and re.search(r" NodeList=n\[2-3\] ", shown), shown
    assert "preflight: all nodes are fit" in printed


def test_a_preflight_that_blames_no_node_starts_nothing(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    batch, output = tmp_path / "job.sbatch", tmp_path / "job.out"
    supervisor = f"{sys.executable} -m launch.in_slurm --run {run} --preflight"
    batch.write_text(f"#!/bin/bash\nexec {supervisor} -- /bin/false pretrain\n")
    job = slurm.sbatch("--nodes=1", "--ntasks-per-node=1", f"--output={output}", str(batch))
    wait_until(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), 240, "the job's end")
    assert "error: preflight: left with exit code 1, and no node is to blame" in output.read_text()
    assert slurm.state(job) == "FAILED" and not (run / "launch" / "attempts.jsonl").exists()


def test_a_verdict_that_is_not_there_names_nobody(tmp_path: Path) -> None:
    assert unfit_nodes(tmp_path / "preflight.json") == {}


@pytest.mark.parametrize("wanted", [True, False])
def test_the_site_decides_whether_nodes_are_measured(wanted: bool) -> None:
    assert ("--preflight" in Supervision(preflight=wanted).options()) is wanted
