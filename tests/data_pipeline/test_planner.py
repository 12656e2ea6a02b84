"""`joy plan --data` extrapolates what the records of a sample run say, and refuses to guess without one."""

import json
import math
from pathlib import Path

import pytest

from data_pipeline.planner import Measured, extrapolate
from megatron_joy.cli.main import main
from megatron_joy.data.manifest import load_manifest
from tests.data_pipeline.corpora import run_inline, texts, write_jsonl, write_pipeline


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline of a run that is finished."""
    folder, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out")
    write_jsonl(folder / "a.jsonl", texts(200))
    pipeline = write_pipeline(folder, out, "[near_duplicates]\nenabled = true\n")
    run_inline(pipeline)
    return pipeline


def planned(pipeline: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, object]:
    assert main(["plan", "--data", str(pipeline), "--json", *options]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_a_plan_for_the_sample_itself_is_what_its_tasks_cost(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(json.loads(finished.read_text().split("folder = ")[1].splitlines()[0]))
    tokens = sum(load_manifest(out / split).totals.tokens for split in ("train", "validation"))
    plan = planned(finished, capsys, "--cores", "1", "--tokens", str(tokens))
    costs = [json.loads(path.read_text())["cost"] for path in out.glob("work/tasks/*/*.json")]
    seconds = sum(cost["cpu_seconds"] for cost in costs)
    assert plan["core_hours"] == pytest.approx(seconds / 3600)
    assert plan["wall_hours"] == pytest.approx(seconds / 3600)
    assert plan["peak_disk_bytes"] == sum(cost["bytes_written"] for cost in costs)
    files = [path.stat().st_size for path in out.glob("*/shard_*")]
    assert plan["shard_bytes"] == sum(files) + sum(
        json.loads(path.read_text())["files"][-1]["bytes"] for path in out.glob("work/tasks/write/*.json")
    )


def test_what_grows_and_what_does_not() -> None:
    write = extrapolate(Measured("write", 4, 36.0, 40.0, 1000, 7), 100.0, 1000, cores=10)
    assert (write["core_hours"], write["wall_hours"], write["disk_bytes"]) == (1.0, 0.1, 100_000)
    assert write["worker_bytes"] == 7
    tokenizer = extrapolate(Measured("tokenizer", 1, 36.0, 40.0, 1000, 7), 100.0, 1000, cores=10)
    assert (tokenizer["core_hours"], tokenizer["wall_hours"], tokenizer["disk_bytes"]) == (0.01, 0.01, 1000)
    cluster = extrapolate(Measured("cluster", 1, 36.0, 40.0, 1000, 7), 100.0, 1000, cores=10)
    assert cluster["core_hours"] == pytest.approx(math.log2(100_000) / math.log2(1000))
    assert cluster["wall_hours"] == cluster["core_hours"]
    match = extrapolate(Measured("match", 16, 36.0, 40.0, 1000, 7), 100.0, 1000, cores=64)
    assert match["core_hours"] == cluster["core_hours"]
    assert match["wall_hours"] == match["core_hours"] / 16  # a task for each band, whatever the size


def test_twenty_trillion_tokens_are_a_million_times_the_work_with_the_assumptions_printed(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = (planned(finished, capsys, "--cores", "64", "--tokens", count) for count in ("20e6", "20e12"))
    stages = [{stage["stage"]: stage for stage in plan["stages"]} for plan in (small, large)]  # type: ignore[attr-defined]
    assert stages[1]["read"]["core_hours"] == pytest.approx(1e6 * stages[0]["read"]["core_hours"])
    assert stages[1]["read"]["wall_hours"] == pytest.approx(stages[1]["read"]["core_hours"] / 64)
    assert stages[1]["tokenizer"] == stages[0]["tokenizer"]
    assert main(["plan", "--data", str(finished)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "20T tokens on 256 cores" in printed
    assert "Workers keep their cores busy" in printed
    assert "starting workers counts too much" in printed
    assert "once more (stage regroup)" in printed


def test_a_pipeline_without_a_finished_sample_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = f"output.folder={tmp_path}/none"
    for arguments, says in (
        ([elsewhere], "make the plan first"),
        (["seed=5"], "made for other settings"),
        (["--gpus", "8"], "--gpus: has no effect with --data"),
    ):
        assert main(["plan", "--data", str(finished), *arguments]) == 2
        assert says in capsys.readouterr().err
    assert main(["plan", "joyai_tiny", "--cores", "8"]) == 2
    assert "--cores: has no effect without --data" in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert "no recipe given" in capsys.readouterr().err
