"""From the records of a sample run to core hours, wall time and disk for any number of tokens.

Every task's record says what it cost. What a stage costs is taken to grow with the tokens; three things are not, and
the plan says which: the tokenizer (one sample of a fixed size), stages of few tasks (no faster with more cores), and
sorting for near-duplicates (each row takes part in as many comparisons as the logarithm of their number).
"""

import math
from dataclasses import dataclass
from typing import Any

import orjson

from data_pipeline.config import Pipeline
from data_pipeline.dedup.lines_stage import SHARES
from data_pipeline.engine import Job, load_plan
from data_pipeline.spool import MOST_AT_ONCE
from data_pipeline.stages import STAGES
from megatron_joy.data.ledger import load_ledger
from megatron_joy.errors import UserError

FIXED = "tokenizer"
SORTED = {"match", "cluster", "repeats"}
# Stages of as many tasks as the sample had, whatever the size: one for each band, or one.
FEW_TASKS = ("match", "cluster", "contamination", "tokenizer", "finish")
MOST_TASKS = {"repeats": SHARES}  # of stages whose tasks grow in number up to here
HOUR = 3600.0
SMALL = 20_000_000  # tokens of a sample below which the start-up of workers says more than their work
ASSUMPTIONS = (
    "Every stage costs as much for a token as in the sample, and this machine's cores are like those of the plan.",
    "Workers keep their cores busy: core hours are seconds of CPU, and waiting for disks or networks is not planned.",
    "The tokenizer costs what it cost here; it, cluster, contamination and finish run on one core, match on one for "
    f"each band and repeats on {SHARES} at most, however many cores there are.",
    "Finding near-duplicates and repeated lines grows with the tokens times the logarithm of the documents.",
    "Memory of a worker: the most that a task of the sample had resident, files that it mapped and Python itself "
    "included, programs that it started left out; it stays while shards keep their size.",
    "Disk: everything that all stages wrote is there at once until the run ends; inputs are not counted.",
)


@dataclass(frozen=True)
class Measured:
    """What a stage cost in the sample; bytes: what it wrote; peak_bytes: resident memory of its largest task."""

    stage: str
    tasks: int
    cpu_seconds: float
    wall_seconds: float
    bytes: int
    peak_bytes: int


def measure(job: Job) -> list[Measured]:
    """The cost of every stage of a finished run. Raises UserError where a task has no record, or one without a cost."""
    found = []
    for stage in STAGES:
        costs = []
        for shard in range(stage.shards(job)):
            path = job.record_path(stage.name, shard)
            try:
                cost = orjson.loads(path.read_bytes())["cost"]
                costs.append([cost[key] for key in ("cpu_seconds", "wall_seconds", "bytes_written", "peak_bytes")])
            except (FileNotFoundError, KeyError):
                raise UserError(
                    f"{path}: no record of what the task cost; finish the sample run first (joy data run)"
                ) from None
        if costs:
            cpu, wall, written, peaks = zip(*costs, strict=True)
            found.append(Measured(stage.name, len(costs), sum(cpu), sum(wall), sum(written), max(peaks)))
    return found


def extrapolate(part: Measured, factor: float, documents: int, cores: int) -> dict[str, Any]:
    """A stage's cost for `factor` times the sample's tokens; documents: of the sample."""
    growth = 1.0 if part.stage == FIXED else factor
    if part.stage in SORTED:
        growth *= max(1.0, math.log2(max(2.0, documents * factor)) / math.log2(max(2, documents)))
    seconds = part.cpu_seconds * growth
    workers = min(cores, part.tasks if part.stage in FEW_TASKS else MOST_TASKS.get(part.stage, cores))
    return {
        "stage": part.stage,
        "sample_cpu_seconds": part.cpu_seconds,
        "core_hours": seconds / HOUR,
        "wall_hours": seconds / HOUR / workers,
        "disk_bytes": round(part.bytes * growth),
        "worker_bytes": part.peak_bytes,
    }


def plan_data(pipeline: Pipeline, tokens: float, cores: int) -> dict[str, Any]:
    """The plan as plain values. Raises UserError when the pipeline has no finished run to measure.

    Args:
        pipeline: whose output folder holds the sample run.
        tokens: to make in all.
        cores: that work at the same time.
    """
    job = Job(pipeline, load_plan(pipeline))
    parts, ledger = measure(job), load_ledger(pipeline.folder)
    made = sum(totals.tokens for totals in ledger.splits.values())
    if not made:
        raise UserError(f"output.folder = {pipeline.folder}: the sample has no token; give one with documents")
    factor = tokens / made
    stages = [extrapolate(part, factor, ledger.steps[0].documents_in, cores) for part in parts]
    written = next(part.bytes for part in parts if part.stage in ("write", "stream"))
    cpu, wall = sum(part.cpu_seconds for part in parts), sum(part.wall_seconds for part in parts)
    shards = math.ceil((job.plan.buckets.total if pipeline.output.shuffle else len(job.plan.tasks)) * factor)
    notes = []
    if pipeline.output.shuffle and shards > MOST_AT_ONCE and not any(part.stage == "regroup" for part in parts):
        notes.append(
            f"From {MOST_AT_ONCE + 1} shards on, all text is written and read once more (stage regroup), which the "
            "sample did not need: it is not in these figures; a sample with smaller shards measures it."
        )
    if made < SMALL:
        notes.append(f"The sample has {made:,} tokens: starting workers counts too much; {SMALL:,} or more say better.")
    return {
        "pipeline": pipeline.name,
        "sample": {"tokens": made, "text_bytes": ledger.steps[-1].bytes_out, "cpu_seconds": cpu, "busy": cpu / wall},
        "tokens": tokens,
        "cores": cores,
        "stages": stages,
        "core_hours": sum(stage["core_hours"] for stage in stages),
        "wall_hours": sum(stage["wall_hours"] for stage in stages),
        "shard_bytes": round(written * factor),
        "peak_disk_bytes": sum(stage["disk_bytes"] for stage in stages),
        "shards": shards,
        "assumptions": [*ASSUMPTIONS, *notes],
    }
