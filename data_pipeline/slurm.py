"""The Slurm executor: a job array for each unfinished stage, each after the one before it, and a job that ends the run.

All jobs are submitted at once and know all they need, so the run goes on when whoever submitted it is gone. The scripts
are slurm/data_array.sbatch and slurm/data_merge.sbatch, filled in from a site file by whoever asks for the run; without
one account, partition and the like come from sbatch's own variables (SBATCH_ACCOUNT, SBATCH_PARTITION, ...), which win
over what a script says.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson

from data_pipeline.engine import WORK, Engine
from megatron_joy.data.atomic import write_atomically
from megatron_joy.errors import UserError, WorkError

SCRIPTS = Path(__file__).parents[1] / "slurm"
JOBS = "slurm_jobs.json"
ARRAY_TASKS = 64  # of a stage, unless --workers says otherwise; Slurm's own bound is MaxArraySize, 1001 by default
POLL_S = 1.0
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
GONE = ""  # what squeue says of a job that it has forgotten


Scripts = Callable[[str], str]  # the text of a template of slurm/, by its name


def plain_script(name: str) -> str:
    """A template as it stands."""
    return (SCRIPTS / name).read_text(encoding="utf-8")


def _sbatch(folder: Path, options: Sequence[str], script: Path, arguments: Sequence[str]) -> str:
    """Submit a script; returns the job's id. Raises UserError, with sbatch's own words, when Slurm refuses."""
    log = str(folder / WORK / "slurm" / "%x_%A_%a.out").replace("%", "%%").replace("%%x_%%A_%%a", "%x_%A_%a")
    command = ["sbatch", "--parsable", f"--output={log}", *options, str(script), *arguments]
    try:
        done = subprocess.run(
            command, env={**os.environ, "JOY_PYTHON": sys.executable}, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UserError("--executor slurm: no sbatch here; run it on a node from which jobs are submitted") from None
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"--executor slurm: sbatch refuses: {line}; mend it (--site, SBATCH_PARTITION, ...) and run again"
        )
    return done.stdout.strip().partition(";")[0]


def job_state(job: str) -> str:
    """A job's state in Slurm's words; GONE when it is forgotten."""
    command = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("--executor slurm: no squeue here; run it on a node from which jobs are submitted") from None
    states = set(done.stdout.split())
    return next(iter(states - ENDED), next(iter(states), GONE))


def refuse_second_submission(folder: Path) -> None:
    """Raises UserError while jobs of an earlier submission into the same folder have not ended."""
    path = folder / WORK / JOBS
    if not path.is_file():
        return
    alive = [job for job in orjson.loads(path.read_bytes()) if job_state(job) not in {*ENDED, GONE}]
    if alive:
        raise UserError(
            f"output.folder = {folder}: jobs {', '.join(alive)} of an earlier run are writing there; wait for them or "
            f"`scancel {' '.join(alive)}`"
        )


def submit(
    engine: Engine,
    left: list[tuple[str, list[int]]],
    pipeline: str,
    overrides: Sequence[str],
    workers: int | None,
    scripts: Scripts,
) -> list[str]:
    """Submit what is left, stage after stage, and the end; returns the jobs' ids. All or none are submitted."""
    folder = engine.job.folder
    array, merge = (folder / WORK / "slurm" / name for name in ("data_array.sbatch", "data_merge.sbatch"))
    for script in (array, merge):
        write_atomically(script, scripts(script.name).encode())
    jobs: list[str] = []

    def after() -> list[str]:
        return [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []

    try:
        for stage, shards in left[:-1]:
            tasks = min(len(shards), workers or ARRAY_TASKS)
            total = engine.stages[stage].shards(engine.job)
            options = [f"--job-name=joy-{stage}", f"--array=0-{tasks - 1}", *after()]
            arguments = [pipeline, stage, str(total), str(tasks), *overrides]
            jobs.append(_sbatch(folder, options, array, arguments))
        jobs.append(_sbatch(folder, ["--job-name=joy-merge", *after()], merge, [pipeline, *overrides]))
    except BaseException:
        if jobs:
            subprocess.run(["scancel", *jobs], check=False)
        raise
    write_atomically(folder / WORK / JOBS, orjson.dumps(jobs))
    return jobs


def follow(
    engine: Engine,
    left: list[tuple[str, list[int]]],
    jobs: Sequence[str],
    on_progress: Callable[[str, int, int], None],
) -> None:
    """Wait until the last job has ended, reporting what the records say. Raises WorkError when the run is not whole."""
    try:
        for stage, shards in left:
            total = engine.stages[stage].shards(engine.job)
            undone = list(shards)
            while True:
                ended = job_state(jobs[-1]) in {*ENDED, GONE}  # asked first: a record may appear just before the end
                undone = [shard for shard in undone if engine.record(stage, shard) is None]
                on_progress(engine.stages[stage].purpose, total - len(undone), total)
                if not undone:
                    break
                if ended:
                    raise WorkError(
                        f"stage {stage}: {len(undone)} of {total} tasks are not done and its jobs have ended; see "
                        f"{engine.job.folder / WORK / 'slurm'}, mend the cause and run again"
                    )
                time.sleep(POLL_S)
        while job_state(jobs[-1]) not in {*ENDED, GONE}:
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"note: the jobs go on; `scancel {' '.join(jobs)}` ends them", file=sys.stderr)
        raise
