"""One contract for every executor: the bytes of one process, and after any kill nothing lost and nothing redone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline.run import EXECUTORS
from tests.data_pipeline.corpora import digests, run_inline, texts, write_jsonl, write_pipeline
from tests.slurm_cluster import Cluster

JOY = [sys.executable, "-m", "megatron_joy.cli.main"]
STARTS = {
    "local": ([], ["--workers", "2"]),
    "mpi": ([str(Path(sys.executable).with_name("mpiexec")), "-n", "3"], []),
    "ray": ([], ["--workers", "2"]),
    "slurm": ([], ["--workers", "2"]),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        write_jsonl(folder / f"{number}.jsonl", texts(150, seed=number))
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed")
    run_inline(write_pipeline(corpus, out))
    return digests(out)


def start(executor: str, pipeline: Path, *options: str, cluster: Cluster | None = None) -> "subprocess.Popen[str]":
    """`joy data run` under an executor, in a session of its own; cluster: Slurm's."""
    before, after = STARTS[executor]
    environment = {
        **(os.environ if cluster is None else cluster.environment),
        "PYTHONPATH": ":".join(sys.path),
        "HOME": str(pipeline.parent),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [*before, *JOY, "data", "run", str(pipeline), "--executor", executor, *after, *options]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_all(process: "subprocess.Popen[str]", pipeline: Path, cluster: Cluster | None) -> None:
    """Kill a run with everything that works for it, wherever that was started."""
    if cluster is not None:
        jobs = json.loads((pipeline.parent / "out" / "work" / "slurm_jobs.json").read_bytes())
        cluster.run("scancel", "--signal=KILL", "--full", *jobs)
        cluster.run("scancel", *jobs)
    own = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in own:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()
    deadline = time.monotonic() + 60
    while any(str(pipeline) in " ".join(found.info["cmdline"] or []) for found in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline, "workers of a killed run live on"
        time.sleep(0.05)


def test_every_executor_is_held_to_this_contract() -> None:
    assert set(EXECUTORS) == set(STARTS)


@pytest.mark.parametrize("executor", STARTS)
def test_a_run_killed_and_started_again_gives_the_bytes_of_one_process(
    executor: str, corpus: Path, undisturbed: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cluster: Cluster | None = request.getfixturevalue("slurm") if executor == "slurm" else None
    # The same inputs under other paths would be other documents' origins.
    pipeline = write_pipeline(corpus, tmp_path / "out").rename(tmp_path / "pipeline.toml")
    process = start(executor, pipeline, cluster=cluster)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("work/tasks/*/*.json"))) < 6:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    kill_all(process, pipeline, cluster)
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("work/tasks/*/*.json")}
    assert len(done) >= 6

    again = start(executor, pipeline, cluster=cluster)
    output, errors = again.communicate(timeout=200)
    assert again.returncode == 0, errors
    assert "kept from an earlier run" in output
    assert digests(tmp_path / "out") == undisturbed
    assert all(path.stat().st_mtime_ns == changed for path, changed in done.items())
    assert not list((tmp_path / "out").rglob(".*partial*"))


@pytest.mark.parametrize("executor", ["mpi"])
def test_a_mistake_ends_every_rank_with_one_line(executor: str, corpus: Path, tmp_path: Path) -> None:
    for option, says in (("sede=3", "unknown key"), ("--workers=2", "whose workers mpiexec starts")):
        process = start(executor, write_pipeline(corpus, tmp_path), option)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert [line for line in errors.splitlines() if line.startswith("error:")] == [errors.splitlines()[0]]
        assert says in errors
    assert list(tmp_path.iterdir()) == []


def test_mpi_without_ranks_is_refused_with_the_way_to_start_it(corpus: Path, tmp_path: Path) -> None:
    pipeline = write_pipeline(corpus, tmp_path)
    done = subprocess.run(
        [*JOY, "data", "run", str(pipeline), "--executor", "mpi"],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "mpiexec -n 9 joy data run" in done.stderr


def kill_one(process: "subprocess.Popen[str]", title: str) -> None:
    """Kill the last started process of a run whose command line has these words."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for found in reversed(psutil.Process(process.pid).children(recursive=True)):
            try:
                if title in " ".join(found.cmdline()):
                    found.kill()
                    return
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.01)
    raise AssertionError(f"no process is called {title}")


@pytest.mark.parametrize(
    ("executor", "title", "goes_on"),
    [("ray", "data_pipeline.worker", True), ("ray", "ray::Station", True), ("mpi", "--executor mpi", False)],
)
def test_one_killed_worker_costs_its_task_and_no_more(
    executor: str, title: str, goes_on: bool, corpus: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """Ray replaces it; MPI ends all ranks with it, and the next run goes on."""
    pipeline = write_pipeline(corpus, tmp_path / "out").rename(tmp_path / "pipeline.toml")
    process = start(executor, pipeline)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("work/tasks/*/*.json"))) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    kill_one(process, title)
    _, errors = process.communicate(timeout=200)
    assert (process.returncode == 0) == goes_on, errors
    if not goes_on:
        again = start(executor, pipeline)
        output, errors = again.communicate(timeout=200)
        assert again.returncode == 0, errors
        assert "kept from an earlier run" in output
    assert digests(tmp_path / "out") == undisturbed
    assert not list((tmp_path / "out").rglob(".*partial*"))
