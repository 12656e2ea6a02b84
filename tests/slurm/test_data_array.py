"""A pipeline's stage as a job array: tasks that fail are tried again, and what follows runs once, after all of them."""

import json
from pathlib import Path

from megatron_joy.data.atomic import PARTIAL_MARK
from tests.data_pipeline.corpora import digests, plan_inline, run_inline, texts, write_jsonl, write_pipeline
from tests.slurm_cluster import Cluster, wait_until

TASKS = 16
AFTER = "--kill-on-invalid-dep=yes"

# Python, but for tasks that die when they are started for the first time: at once, or with half of a shard written.
# What such a task leaves behind is noted.
FLAKY = """#!/bin/bash
echo "$*" >> {log}
first() {{ [[ "$*" == *"--stage write --shard $shard" ]] && mkdir {log}.$shard 2>/dev/null; }}
for shard in {failing}; do
    if first "$@"; then kill -9 $$; fi
done
for shard in {torn}; do
    if first "$@"; then
        "{python}" -m tests.slurm.killed_worker "${{@:3}}" &
        wait $!
        code=$?
        find {out} -name ".*.bin.partial-$!" -exec stat --format="%s %n" {{}} + > {log}.$shard/left
        exit $code
    fi
done
exec "{python}" "$@"
"""


def flaky_python(folder: Path, **settings: object) -> Path:
    """An interpreter for JOY_PYTHON that logs its calls and fails the first write of some shards."""
    path = folder / "python"
    path.write_text(FLAKY.format(log=folder / "calls", out=folder / "out", **settings))
    path.chmod(0o755)
    return path


def test_an_array_with_tasks_that_die_once_at_once_or_in_mid_write_is_whole_and_merged_once(
    slurm: Cluster, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", texts(780))
    pipeline = write_pipeline(tmp_path / "in", tmp_path / "out", shard_megabytes=0.013)
    engine = plan_inline(pipeline)
    for stage, shards in engine.unfinished():
        for shard in shards if stage not in ("write", "finish") else ():
            engine.run_task(stage, shard)
    shards = len(engine.pending("write"))
    assert shards > TASKS  # some tasks have two shards
    torn = (7, shards - 1)  # the last is the second of its task, whose first is done then
    python = flaky_python(tmp_path, python=slurm.environment["JOY_PYTHON"], failing="3 11", torn=f"{torn[0]} {torn[1]}")
    export = f"--export=ALL,JOY_PYTHON={python},JOY_TASK_WAIT_SECONDS=0"
    log = f"--output={tmp_path}/%A_%a.out"
    job = slurm.sbatch(
        export, log, f"--array=0-{TASKS - 1}", "slurm/data_array.sbatch", str(pipeline), "write", str(shards), "16"
    )
    merge = slurm.sbatch(export, log, AFTER, f"--dependency=afterok:{job}", "slurm/data_merge.sbatch", str(pipeline))
    slurm.wait_for(merge, "COMPLETED")
    assert slurm.state(job) == "COMPLETED"
    for shard in torn:
        assert (
            f"stage write shard {shard}: attempt 1 of 3 left with 137"
            in (tmp_path / f"{job}_{shard % TASKS}.out").read_text()
        )
        size, partial = (tmp_path / f"calls.{shard}" / "left").read_text().split()  # what the kill left, and where
        whole = Path(partial.replace("/.", "/").partition(PARTIAL_MARK)[0])
        assert 0 < int(size) < whole.stat().st_size
        assert not Path(partial).exists()  # it lay there until the merge
    calls = (tmp_path / "calls").read_text().splitlines()
    tried = sorted(int(call.rpartition(" ")[2]) for call in calls if "--stage write" in call)
    assert tried == sorted([*range(shards), 3, 11, *torn])
    assert sum("data run" in call for call in calls) == 1
    assert not list((tmp_path / "out").rglob(f".*{PARTIAL_MARK}*"))
    run_inline(write_pipeline(tmp_path / "in", tmp_path / "other", shard_megabytes=0.013))
    assert digests(tmp_path / "out") == digests(tmp_path / "other")


# Python, but for the first start of shard 1, which stops with half of the shard written; notes on which node each ran.
STUCK = """#!/bin/bash
echo "$SLURMD_NODENAME $*" >> {log}
if [[ "$*" == *"--stage write --shard 1" ]] && mkdir {log}.stuck 2>/dev/null; then
    JOY_TEST_WAIT=1 exec "{python}" -m tests.slurm.killed_worker "${{@:3}}"
fi
exec "{python}" "$@"
"""


def test_what_a_lost_node_was_writing_is_written_on_another_and_the_array_is_whole(
    slurm: Cluster, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", texts(200))
    pipeline = write_pipeline(tmp_path / "in", tmp_path / "out")
    engine = plan_inline(pipeline)
    for stage, shards in engine.unfinished():
        for shard in shards if stage not in ("write", "finish") else ():
            engine.run_task(stage, shard)
    python, log = tmp_path / "python", tmp_path / "calls"
    python.write_text(STUCK.format(log=log, python=slurm.environment["JOY_PYTHON"]))
    python.chmod(0o755)
    export, output = f"--export=ALL,JOY_PYTHON={python}", f"--output={tmp_path}/%A_%a.out"
    shards = str(len(engine.pending("write")))
    array = ("--array=0-2", "slurm/data_array.sbatch", str(pipeline), "write", shards, "3")
    job = slurm.sbatch(export, output, *array)
    merge = slurm.sbatch(export, output, AFTER, f"--dependency=afterok:{job}", "slurm/data_merge.sbatch", str(pipeline))

    def half_written() -> list[Path]:
        return [path for path in (tmp_path / "out").rglob(f".*.bin{PARTIAL_MARK}*") if path.stat().st_size]

    wait_until(lambda: slurm.state(f"{job}_1") == "RUNNING" and len(half_written()) == 1, 60, "half a shard")
    node = slurm.run("squeue", "--noheader", "--format=%N", f"--jobs={job}_1")
    slurm.kill_node(node)
    slurm.wait_for(merge, "COMPLETED")
    calls = [
        line.split(maxsplit=1) for line in log.read_text().splitlines() if line.endswith("--stage write --shard 1")
    ]
    first, second = (where for where, _ in calls)
    assert first == node != second
    assert half_written() == []
    run_inline(write_pipeline(tmp_path / "in", tmp_path / "other"))
    assert digests(tmp_path / "out") == digests(tmp_path / "other")


def test_a_mistake_is_not_tried_again_and_what_depends_on_it_is_cancelled(slurm: Cluster, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", texts(20))
    pipeline = write_pipeline(tmp_path / "in", tmp_path / "out")
    log = f"--output={tmp_path}/%A_%a.out"
    job = slurm.sbatch(log, "--array=0-0", "slurm/data_array.sbatch", str(pipeline), "write", "1", "1")
    merge = slurm.sbatch(log, AFTER, f"--dependency=afterok:{job}", "slurm/data_merge.sbatch", str(pipeline))
    slurm.wait_for(merge, "CANCELLED")
    assert slurm.state(job) == "FAILED"
    printed = (tmp_path / f"{job}_0.out").read_text()
    assert "make the plan first" in printed
    assert printed.count("error:") == 1
    assert not (tmp_path / "out" / "train").exists()
    assert json.loads(slurm.run("squeue", "--json", f"--jobs={merge}"))["jobs"][0]["restart_cnt"] == 0
