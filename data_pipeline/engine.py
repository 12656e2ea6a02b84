"""The engine: deterministic (stage, shard) tasks without a driver's state.

A pipeline is a list of stages, each a number of shards; task (stage, shard) is a function of the plan and of earlier
stages' outputs. A task writes its files atomically and then its record (`work/tasks/<stage>/<shard>.json`: fingerprint,
sizes, checksums, statistics). A task is done when its record has the expected fingerprint and its files their sizes:
whoever asks, on any machine, gets the same answer, so a killed run goes on where it was and nothing is done twice.
A stage's fingerprint covers its code's version, its settings and all stages before it: what a change does not touch is
kept, what it touches is made again.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.config import Pipeline, pipeline_sha256
from data_pipeline.cost import Stopwatch
from data_pipeline.inventory import MEGABYTE, WRITTEN, InputFile, Piece, take_inventory
from data_pipeline.spool import SPLITS, Buckets, divide
from megatron_joy.data.atomic import PARTIAL_MARK, write_atomically
from megatron_joy.data.checksum import file_blake3
from megatron_joy.data.manifest import MANIFEST_NAME
from megatron_joy.errors import UserError, WorkError

WORK = "work"
PLAN = "plan.json"
LOCK = "lock"
SHARD_FILE = re.compile(r"shard_\d{5,}\.(bin|idx|documents\.jsonl\.zst|scores\.npy)")
PIPELINE = "pipeline.json"  # resolved, for whoever asks later what a document went through


@dataclass(frozen=True)
class OutputFile:
    """A file that a task wrote, relative to the output folder. blake3: None for scratch that has its own checksums."""

    path: str
    bytes: int
    blake3: str | None


@dataclass(frozen=True)
class TaskResult:
    """What a task's function returns: what it wrote and what it counted."""

    files: list[OutputFile]
    statistics: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What every worker must agree on: the inputs, the pieces of each read task, the buckets."""

    pipeline: str
    pipeline_sha256: str
    inputs: list[InputFile]
    tasks: list[list[Piece]]
    buckets: Buckets

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of inputs, tasks and buckets."""
        return hashlib.sha256(orjson.dumps([self.inputs, self.tasks, self.buckets])).hexdigest()


@dataclass(frozen=True)
class Job:
    """A pipeline, its plan and where it is written: all that a task needs."""

    pipeline: Pipeline
    plan: Plan

    @property
    def folder(self) -> Path:
        """The output folder."""
        return self.pipeline.folder

    def task_folder(self, stage: str, shard: int) -> Path:
        """Where a task puts files that only later stages read."""
        return self.folder / WORK / stage / f"{shard:05d}"

    def record_path(self, stage: str, shard: int) -> Path:
        """Where a task's record is."""
        return self.folder / WORK / "tasks" / stage / f"{shard:05d}.json"

    def describe(self, path: Path, digest: str | None = None) -> OutputFile:
        """A written file with its size and checksum, computed here unless the writer already knows it."""
        if digest is None:
            digest = file_blake3(path)
        return OutputFile(path.relative_to(self.folder).as_posix(), path.stat().st_size, digest)

    def describe_scratch(self, path: Path) -> OutputFile:
        """A written file that only later stages read and that carries its own checksums."""
        return OutputFile(path.relative_to(self.folder).as_posix(), path.stat().st_size, None)


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    name: in paths and on the command line; purpose: one line for people; version: raised when the bytes that the stage
    writes change; needs: stages whose files it reads; settings: what of the pipeline its bytes depend on; shards: how
    many tasks; run: the task.
    """

    name: str
    purpose: str
    version: int
    needs: tuple[str, ...]
    settings: Callable[[Job], Any]
    shards: Callable[[Job], int]
    run: Callable[[Job, int], TaskResult]


def make_plan(pipeline: Pipeline) -> Plan:
    """Look at the inputs and divide the work. Raises UserError when there is nothing to read."""
    inventory = take_inventory(pipeline)
    output = pipeline.output
    buckets = divide(inventory.text_bytes, output.validation_share, int(output.shard_megabytes * MEGABYTE))
    return Plan(pipeline.name, pipeline_sha256(pipeline), inventory.inputs, inventory.tasks, buckets)


def plan_path(pipeline: Pipeline) -> Path:
    """Where a pipeline's plan is kept."""
    return pipeline.folder / WORK / PLAN


def _holds_shards(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).exists() or any(SHARD_FILE.fullmatch(path.name) for path in folder.glob("shard_*"))


def _is_foreign(path: Path) -> bool:
    """Whether something is there that a run killed before it had written its plan cannot have left."""
    if not path.is_dir():
        return path.exists()
    return any(entry.name not in (LOCK, PIPELINE) and PARTIAL_MARK not in entry.name for entry in path.iterdir())


def _stored_plan(path: Path) -> dict[str, Any]:
    """A plan as it was written. Raises UserError when it is none."""
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError:
        content = None
    if not isinstance(content, dict) or not set(Plan.__dataclass_fields__) <= set(content):
        raise UserError(f"{path}: damaged, no plan of a run; give another output.folder, or remove this one")
    return content


def check_owner(pipeline: Pipeline) -> None:
    """Raises UserError when the output folder belongs to something else, or may not be looked into."""
    try:
        _check_owner(pipeline)
    except OSError as error:
        raise UserError(
            f"output.folder = {pipeline.output.folder}: cannot be read ({error.strerror}); give another folder"
        ) from None


def _check_owner(pipeline: Pipeline) -> None:
    path = plan_path(pipeline)
    if path.is_file():
        owner = _stored_plan(path).get("pipeline")
        if owner != pipeline.name:
            raise UserError(
                f"output.folder = {pipeline.output.folder}: holds the output of pipeline {owner!r}, not of "
                f"{pipeline.name!r}; give another folder"
            )
    elif any(_holds_shards(pipeline.folder / split) for split in SPLITS):
        raise UserError(
            f"output.folder = {pipeline.output.folder}: holds shards of unknown origin; give another folder"
        )
    elif foreign := [name for name in WRITTEN if _is_foreign(pipeline.folder / name)]:
        raise UserError(
            f"output.folder = {pipeline.output.folder}: holds {', '.join(foreign)}, which no run of ours has left and "
            "this one would write over; give another folder"
        )


def save_plan(pipeline: Pipeline, plan: Plan) -> None:
    """Write the plan into an output folder that is the pipeline's own. Raises UserError when it is not."""
    check_owner(pipeline)
    write_atomically(pipeline.folder / WORK / PIPELINE, pipeline.model_dump_json(indent=2).encode())
    write_atomically(plan_path(pipeline), orjson.dumps(asdict(plan)))


def load_plan(pipeline: Pipeline) -> Plan:
    """The plan that `joy data run` made. Raises UserError when there is none, or it is of another pipeline."""
    path = plan_path(pipeline)
    try:
        content = _stored_plan(path)
    except FileNotFoundError:
        raise UserError(f"{path}: not there; make the plan first (joy data run, or the worker with --plan)") from None
    plan = Plan(
        pipeline=content["pipeline"],
        pipeline_sha256=content["pipeline_sha256"],
        inputs=[InputFile(**file) for file in content["inputs"]],
        tasks=[[Piece(**piece) for piece in task] for task in content["tasks"]],
        buckets=Buckets(**content["buckets"]),
    )
    if plan.pipeline_sha256 != pipeline_sha256(pipeline):
        raise UserError(f"{path}: made for other settings of pipeline {plan.pipeline!r}; make the plan again")
    return plan


class Engine:
    """Knows which tasks there are, which are done, and how to do one. Holds no state that is not on disk."""

    def __init__(self, job: Job, stages: list[Stage]) -> None:
        self.job = job
        self.stages = {stage.name: stage for stage in stages}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Each stage's fingerprint: its version and settings, on top of those of all stages before it.

        One without tasks and settings is passed over: a stage that somebody else needs costs this run nothing.
        """
        fingerprint = self.job.plan.fingerprint
        found = {}
        for stage in self.stages.values():
            settings = stage.settings(self.job)
            if settings is not None or stage.shards(self.job):
                content = orjson.dumps([fingerprint, stage.name, stage.version, settings])
                fingerprint = hashlib.sha256(content).hexdigest()
            found[stage.name] = fingerprint
        return found

    def record(self, stage: str, shard: int) -> dict[str, Any] | None:
        """A done task's record, else None."""
        try:
            record: dict[str, Any] = orjson.loads(self.job.record_path(stage, shard).read_bytes())
            whole = record["fingerprint"] == self.fingerprints[stage] and all(
                (self.job.folder / file["path"]).stat().st_size == file["bytes"] for file in record["files"]
            )
        except (FileNotFoundError, orjson.JSONDecodeError, KeyError, TypeError):
            return None
        return record if whole else None

    def pending(self, stage: str) -> list[int]:
        """Shards of a stage that are not done."""
        count = self.stages[stage].shards(self.job)
        return [shard for shard in range(count) if self.record(stage, shard) is None]

    def unfinished(self) -> list[tuple[str, list[int]]]:
        """What is left to do, in order: the last stage, and whatever an unfinished stage needs.

        Files that nobody needs any more may be gone.
        """
        left: list[tuple[str, list[int]]] = []
        wanted = {list(self.stages)[-1]}
        for name, stage in reversed(self.stages.items()):
            shards = self.pending(name) if name in wanted else []
            if shards:
                left.append((name, shards))
                wanted.update(stage.needs)
        return left[::-1]

    def run_task(self, stage: str, shard: int) -> dict[str, Any]:
        """Do one task, unless it is done; returns its record.

        Raises UserError for a stage or shard that the plan does not have, WorkError when an earlier stage is not whole.
        """
        if stage not in self.stages:
            raise UserError(f"--stage {stage}: no such stage; there are {', '.join(self.stages)}")
        count = self.stages[stage].shards(self.job)
        if not 0 <= shard < count:
            raise UserError(f"--shard {shard}: stage {stage} has shards 0 to {count - 1}")
        done = self.record(stage, shard)
        if done is not None:
            return done
        stopwatch = Stopwatch()
        result = self.stages[stage].run(self.job, shard)
        record = {
            "stage": stage,
            "shard": shard,
            "fingerprint": self.fingerprints[stage],
            "files": [asdict(file) for file in result.files],
            "statistics": result.statistics,
            "cost": stopwatch.cost(sum(file.bytes for file in result.files)),
        }
        write_atomically(self.job.record_path(stage, shard), orjson.dumps(record, option=orjson.OPT_INDENT_2))
        return record


def statistics_of(job: Job, stage: str, count: int) -> list[dict[str, Any]]:
    """What every task of an earlier stage counted. Raises WorkError when one has not run."""
    found = []
    for shard in range(count):
        path = job.record_path(stage, shard)
        try:
            found.append(orjson.loads(path.read_bytes())["statistics"])
        except FileNotFoundError:
            raise WorkError(f"{path}: not there; stage {stage} must be whole before the next one starts") from None
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise WorkError(f"{path}: damaged; remove it and run again") from None
    return found


def remove_partial_files(folder: Path) -> None:
    """Remove what killed workers left half-written. Only call it while nothing else writes into the folder."""
    for path in folder.rglob(f".*{PARTIAL_MARK}*"):
        path.unlink(missing_ok=True)
