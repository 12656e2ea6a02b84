"""The worker command is all that a scheduler needs, and it never imports torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.local import LocalPool
from data_pipeline.stages import STAGES
from megatron_joy.errors import UserError, WorkError
from tests.data_pipeline.corpora import digests, run_inline, texts, write_jsonl, write_pipeline

ENVIRONMENT = {**os.environ, "PYTHONPATH": ":".join(sys.path)}


def worker(*arguments: str, **options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "data_pipeline.worker", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "in" / "a.jsonl", texts(120))
    return write_pipeline(tmp_path / "in", tmp_path / "out", shard_megabytes=0.06)


def test_a_scheduler_can_do_a_run_task_by_task(pipeline: Path, tmp_path: Path) -> None:
    planned = worker(str(pipeline), "--plan")
    assert planned.returncode == 0, planned.stderr
    counts = json.loads(planned.stdout)
    assert list(counts) == [stage.name for stage in STAGES]
    for stage, count in counts.items():
        for shard in reversed(range(count)):
            done = worker(str(pipeline), "--stage", stage, "--shard", str(shard))
            assert done.returncode == 0, done.stderr
    first = digests(tmp_path / "out")
    run_inline(write_pipeline(tmp_path / "in", tmp_path / "other", shard_megabytes=0.06))
    assert digests(tmp_path / "other") == first


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--stage", "read", "--shard", "0"], "make the plan first"),
        (["--plan", "seed=x"], "seed = "),
        ([], "give --stage and --shard, or --plan"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(pipeline: Path, arguments: list[str], says: str) -> None:
    done = worker(str(pipeline), *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_wrong_stages_and_shards_and_early_tasks_are_refused(pipeline: Path) -> None:
    assert worker(str(pipeline), "--plan").returncode == 0
    for arguments, code, says in (
        (
            ["--stage", "reed", "--shard", "0"],
            2,
            "no such stage; there are read, regroup, sign, match, verify, cluster, overlap, contamination",
        ),
        (["--stage", "read", "--shard", "99"], 2, "stage read has shards 0 to "),
        (["--stage", "write", "--shard", "0"], 1, "must be whole before the next one starts"),
        (["seed=9", "--stage", "read", "--shard", "0"], 2, "made for other settings"),
    ):
        done = worker(str(pipeline), *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert says in done.stderr


def test_nothing_in_the_pipeline_imports_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, data_pipeline\n"
        "for module in pkgutil.iter_modules(data_pipeline.__path__):\n"
        "    importlib.import_module(f'data_pipeline.{module.name}')\n"
        "import megatron_joy.data.verify, megatron_joy.data.inspect, megatron_joy.cli.data_command\n"
        "import megatron_joy.cli.tokenizer_command\n"
        "print([name for name in ('torch', 'transformers', 'awkward') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def pool_of(tmp_path: Path, code: str) -> LocalPool:
    """A pool whose workers are a small program instead of the worker command."""
    program = tmp_path / "program.py"
    program.write_text(f"import sys, json, os\nfor line in sys.stdin:\n    stage, shard = line.split()\n    {code}\n")
    pool = LocalPool("x", [], 2)
    for one in pool._pool:
        one._command = [sys.executable, str(program)]
    return pool


ANSWER = "print(json.dumps({'kind': KIND, 'message': 'm', 'resident_bytes': 0, 'shard': int(shard)}), flush=True)"


def test_a_pool_gives_every_task_once_and_reports_each(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, ANSWER.replace("KIND", "'done'"))
    done: list[int] = []
    pool.run("s", range(20), lambda answer: done.append(answer["shard"]))
    pool.run("s", [], lambda answer: done.append(-1))
    pool.close()
    assert sorted(done) == list(range(20))


@pytest.mark.parametrize(("kind", "error"), [("user", UserError), ("work", WorkError)])
def test_the_first_error_of_a_task_ends_the_stage_as_what_it_is(
    tmp_path: Path, kind: str, error: type[Exception]
) -> None:
    pool = pool_of(tmp_path, ANSWER.replace("KIND", f"'{kind}'"))
    with pytest.raises(error, match="m"):
        pool.run("s", range(20), lambda answer: None)
    pool.close()


def test_a_task_that_kills_every_worker_is_named_with_the_signal(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, "os.kill(os.getpid(), 9)")
    with pytest.raises(WorkError, match=r"stage s shard \d: its worker died 3 times \(killed by signal 9"):
        pool.run("s", [0, 1], lambda answer: None)
    pool.close()


def test_a_worker_that_has_grown_is_replaced_between_tasks(tmp_path: Path) -> None:
    pool = pool_of(
        tmp_path, "print(json.dumps({'kind': 'done', 'resident_bytes': 1 << 40, 'pid': os.getpid()}), flush=True)"
    )
    pids: list[int] = []
    pool.run("s", range(6), lambda answer: pids.append(answer["pid"]))
    pool.close()
    assert len(set(pids)) == 6
