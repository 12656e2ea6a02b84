"""`joy data run`: plan, do what is not done yet, publish. All that matters is in the files, so it can be killed."""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.config import Pipeline, load_pipeline
from data_pipeline.engine import (
    LOCK,
    WORK,
    Engine,
    Job,
    check_owner,
    make_plan,
    remove_partial_files,
    save_plan,
    statistics_of,
)
from data_pipeline.finish import tidy
from data_pipeline.local import LocalPool
from data_pipeline.pool import Pool
from data_pipeline.score.scorers import check_models
from data_pipeline.slurm import Scripts, follow, plain_script, refuse_second_submission, submit
from data_pipeline.stages import STAGES, check_tokenizer
from megatron_joy.errors import UserError, WorkError

EXECUTORS = ("local", "mpi", "ray", "slurm")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What a run did. tasks_done: in this run; tasks_kept: from an earlier one; notes: what a person should know."""

    pipeline: Pipeline
    tasks_done: int
    tasks_kept: int
    notes: list[str]
    checked: int


def available_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def check_executor(executor: str) -> None:
    """Raises UserError, naming what exists, for an executor that does not."""
    if executor not in EXECUTORS:
        raise UserError(f"--executor {executor}: unknown; available: {', '.join(EXECUTORS)}")


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Hold the output folder's lock; it goes with the process. Raises UserError when another run holds it."""
    lock = folder / WORK / LOCK
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = open(lock, "w")  # noqa: SIM115 (closed by the with below)
    except OSError as error:
        raise UserError(
            f"output.folder = {folder}: cannot be written ({error.strerror}); give another folder"
        ) from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output.folder = {folder}: another run is writing there; wait for it or stop it") from None
        yield


def run_pipeline(
    name_or_path: str,
    overrides: Sequence[str] = (),
    executor: str = "local",
    workers: int | None = None,
    on_progress: Progress = lambda stage, done, total: None,
    scripts: Scripts = plain_script,
) -> Outcome:
    """Run a pipeline to its end, or go on where an earlier run stopped.

    on_progress(purpose of the stage, tasks done, tasks in all) is called as tasks finish. scripts: what is submitted
    under Slurm. Raises UserError, before
    anything is published, for what is wrong with the pipeline or its inputs; WorkError when the work fails.
    """
    check_executor(executor)
    if executor == "slurm":
        return _run_under_slurm(name_or_path, overrides, workers, on_progress, scripts)
    # The workers come first: under MPI they run already, and must hear of it when something here is wrong.
    with _open_pool(executor, name_or_path, overrides, workers) as pool:
        _check_workers(executor, workers)
        pipeline = load_pipeline(name_or_path, overrides)
        check_owner(pipeline)
        check_tokenizer(pipeline)
        check_models(pipeline)
        job = Job(pipeline, make_plan(pipeline))
        with sole_run(pipeline.folder):
            try:
                return _finish_job(job, pool, on_progress)
            except OSError as error:
                where = error.filename or pipeline.folder
                raise WorkError(f"{where}: {error.strerror}; mend it and run again") from None


@contextmanager
def _open_pool(executor: str, pipeline: str, overrides: Sequence[str], workers: int | None) -> Iterator[Pool]:
    """The executor's workers, ended with the block: at once when it fails."""
    pool = _make_pool(executor, pipeline, overrides, workers)
    try:
        yield pool
    except BaseException:
        pool.close(kill=True)
        raise
    pool.close()


def _check_workers(executor: str, workers: int | None) -> None:
    if workers is None:
        return
    if workers < 1:
        raise UserError(f"--workers {workers}: expects 1 or more")
    if executor == "mpi":
        raise UserError("--workers: has no effect with --executor mpi, whose workers mpiexec starts; remove it")


def _make_pool(executor: str, pipeline: str, overrides: Sequence[str], workers: int | None) -> Pool:
    if executor == "mpi":
        from data_pipeline.mpi import MpiPool, world

        return MpiPool(world())
    if executor == "ray":
        from data_pipeline.ray_pool import RayPool

        return RayPool(pipeline, overrides, workers)
    return LocalPool(pipeline, overrides, workers or available_cpus())


def serve_as_rank(pipeline: str, overrides: Sequence[str]) -> bool:
    """Under `--executor mpi`: on every rank but 0 do tasks until there are no more, and say so; False on rank 0.

    Raises UserError where there is no world of several ranks.
    """
    from data_pipeline.mpi import serve, world

    comm = world()
    if comm.rank:
        serve(comm, pipeline, overrides)
    return bool(comm.rank)


def _run_under_slurm(
    name_or_path: str, overrides: Sequence[str], workers: int | None, on_progress: Progress, scripts: Scripts
) -> Outcome:
    """Submit what is left as job arrays and wait for their end; the last job takes the folder's lock and publishes."""
    _check_workers("slurm", workers)
    pipeline = load_pipeline(name_or_path, overrides)
    check_owner(pipeline)
    check_tokenizer(pipeline)
    check_models(pipeline)
    job = Job(pipeline, make_plan(pipeline))
    with sole_run(pipeline.folder):
        refuse_second_submission(pipeline.folder)
        engine, left = _prepare(job)
        jobs = submit(engine, left, name_or_path, overrides, workers, scripts) if left else []
    if left:
        follow(engine, left, jobs, on_progress)
    return _outcome(job, sum(len(shards) for _, shards in left))


def _finish_job(job: Job, pool: Pool, on_progress: Progress) -> Outcome:
    """Do what is left of a planned job."""
    engine, left = _prepare(job)
    done = _run_stages(engine, left, pool, on_progress)
    tidy(job)
    return _outcome(job, done)


def _prepare(job: Job) -> tuple[Engine, list[tuple[str, list[int]]]]:
    """Write the plan that all workers share; returns what is left to do. Nothing half-written stays visible."""
    save_plan(job.pipeline, job.plan)
    engine = Engine(job, STAGES)
    left = engine.unfinished()
    if left:
        remove_partial_files(job.folder)
    return engine, left


def _outcome(job: Job, done: int) -> Outcome:
    total = sum(stage.shards(job) for stage in STAGES)
    finish: dict[str, Any] = statistics_of(job, "finish", 1)[0]
    return Outcome(job.pipeline, done, total - done, finish["notes"], finish["checked"])


def _run_stages(engine: Engine, left: list[tuple[str, list[int]]], pool: Pool, on_progress: Progress) -> int:
    """Run what is left, stage by stage; returns how many tasks that were."""
    for stage, shards in left:
        purpose = engine.stages[stage].purpose
        total = engine.stages[stage].shards(engine.job)
        state = [total - len(shards)]
        on_progress(purpose, state[0], total)

        def count(answer: dict[str, Any], purpose: str = purpose, total: int = total, state: list[int] = state) -> None:
            state[0] += 1
            on_progress(purpose, state[0], total)

        pool.run(stage, shards, count)
    return sum(len(shards) for _, shards in left)
