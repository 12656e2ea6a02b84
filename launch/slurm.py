"""`joy launch slurm`: everything that can be checked before a job queues, then the job.

Nothing is written and nothing queued before all checks are through, Slurm's own among them.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launch.local import check
from launch.plan import fits
from launch.slurm_ranks import ask
from launch.slurm_site import SAFE_PATH, Site, fill_in, site_options, site_region
from megatron_joy import __version__
from megatron_joy.errors import UserError, WorkError
from megatron_joy.recipe import Recipe, dump_recipe, load_recipe
from megatron_joy.recipe.timetable import Timetable
from megatron_joy.runstate import launch_folder
from megatron_joy.runstate.files import read_json, write_json
from megatron_joy.runstate.state import updates_saved

JOBS = "jobs.json"
SNAPSHOT = "submitted.toml"
LIVE = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD"}
PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "pydantic")
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    recipe: str
    overrides: Sequence[str]
    nodes: int
    gpus_per_node: int
    tasks_per_node: int | None
    site: Site
    spares: int = 0
    chain: bool = False
    force: bool = False


@dataclass(frozen=True)
class Script:
    """A job: its script, and the stage that it ends with."""

    stage: str | None
    text: str


def tasks_per_node(request: Request) -> int:
    """One rank for each GPU, or what was asked for."""
    tasks = request.tasks_per_node or request.gpus_per_node
    if not tasks:
        raise UserError("--gpus-per-node 0: without GPUs, say how many ranks a node has with --tasks-per-node")
    return tasks


def check_request(request: Request, recipe: Recipe) -> list[str]:
    """Notes. Raises UserError for what can't run: another world than the layout's, missing data, too little memory."""
    size, tasks = recipe.layout.world_size, tasks_per_node(request)
    if request.nodes * tasks != size:
        nodes, rest = divmod(size, tasks)
        parts = recipe.layout.model_parallel_size
        replicas, odd = divmod(request.nodes * tasks, parts)
        fix = f"--nodes {nodes}" if not rest else f"--tasks-per-node {size // request.nodes or 1}"
        fix += "" if odd else f" or layout.data_parallel_size={replicas}"
        raise UserError(
            f"--nodes {request.nodes} x {tasks} ranks a node = {request.nodes * tasks} processes, but the recipe's "
            f"layout needs {size}; ask for {fix}"
        )
    run = Path(recipe.run.folder or "")
    if not SAFE_PATH.fullmatch(str(run)):
        raise UserError(f"run.folder {run}: Slurm's paths take letters, digits and _ . / @ + = , : - only; rename it")
    check(recipe)
    _check_tokenizer(recipe)
    _check_jobs(run)
    return _check_memory(request, recipe)


def _check_tokenizer(recipe: Recipe) -> None:
    folder = recipe.data.tokenizer
    if folder is not None and not (Path(folder) / "tokenizer.json").is_file():
        raise UserError(f"data.tokenizer {folder}: has no tokenizer.json; name the folder of a tokenizer")


def _check_memory(request: Request, recipe: Recipe) -> list[str]:
    if not request.gpus_per_node:
        return []
    if request.site.gpu is None:
        return ["memory is not planned for: say which GPU with --gpu or the site's `gpu`"]
    problem = fits(recipe, request.site.gpu)
    if problem and not request.force:
        raise UserError(f"{problem}; --force submits it all the same")
    return [f"{problem}; submitted all the same"] if problem else []


def jobs_of(run: Path) -> list[str]:
    """Ids of the jobs that were last submitted for a run."""
    value = read_json(launch_folder(run) / JOBS) or {}
    return [str(job["id"]) for job in value.get("jobs", [])]


def _check_jobs(run: Path) -> None:
    for job in jobs_of(run):
        shown = ask("squeue", f"--jobs={job}", "--states=all", "--noheader", "--format=%T", check=False)
        if shown in LIVE:
            raise UserError(
                f"run.folder {run}: job {job} of this run is {shown}; wait for it, `scancel {job}`, or name a new "
                "folder"
            )


def scripts(request: Request, recipe: Recipe, arguments: Sequence[str]) -> list[Script]:
    """The job, or one for each stage of a chain. arguments: what follows `joy pretrain`."""
    if request.chain and not recipe.stages:
        raise UserError("--chain: the recipe has no [[stages]]; leave it out")
    stages = stages_left(recipe) if request.chain else [None]
    return [Script(stage, _script(request, recipe, stage, arguments)) for stage in stages]


def stages_left(recipe: Recipe) -> list[str]:
    """Stages of the recipe that its run has not done yet; the last one in any case, which then ends at once."""
    stages, done = Timetable(recipe).stages, updates_saved(Path(recipe.run.folder or ""))
    return [stage.name for stage in stages if stage.last_step > done or stage is stages[-1]]


def _script(request: Request, recipe: Recipe, stage: str | None, arguments: Sequence[str]) -> str:
    run = Path(recipe.run.folder or "")
    options = site_options(request.site) | {
        "job-name": f"{recipe.name}-{stage}" if stage else recipe.name,
        "nodes": str(request.nodes + request.spares),
        "ntasks-per-node": str(tasks_per_node(request)),
        "gpus-per-node": str(request.gpus_per_node) if request.gpus_per_node else None,
        "output": str(run / "logs" / "slurm-%j.out"),
    }
    supervisor = ["--run", str(run), *request.site.supervisor.options()]
    supervisor += ["--spares", str(request.spares)] if request.spares else []
    words = [*arguments, *([f"run.last_stage={stage}"] if stage else [])]
    python = request.site.python or sys.executable
    return fill_in("pretrain.sbatch", options, site_region(request.site, python, supervisor, words))


def would_run(script: Script) -> None:
    """Raises UserError with Slurm's own reason when it would not take the job."""
    try:
        done = subprocess.run(
            ["sbatch", "--test-only"], input=script.text, capture_output=True, text=True, timeout=60, check=False
        )
    except FileNotFoundError:
        raise UserError("sbatch: not found; run this on a login node, or print the script with --render") from None
    if done.returncode:
        said = [line.partition(": ")[2] for line in done.stderr.splitlines() if line.strip()]
        reasons = "; ".join(dict.fromkeys(line.removeprefix("error: ") for line in said))
        raise UserError(f"Slurm would not take the job: {reasons}; nothing is queued")


def code_version() -> dict[str, Any]:
    """The commit of this code and whether files differ from it; None where it is no clone."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "changed_files": None if changed is None else len(changed.splitlines())}


def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def snapshot(request: Request, recipe: Recipe) -> None:
    """Puts what the job starts from into the run's folder: later edits of the recipe don't reach a queued job."""
    run = Path(recipe.run.folder or "")
    (run / "logs").mkdir(parents=True, exist_ok=True)  # without it the job would fail without a log
    folder = launch_folder(run)
    folder.mkdir(exist_ok=True)
    (folder / SNAPSHOT).write_text(dump_recipe(recipe), encoding="utf-8")
    submission = {
        "time": time.time(),
        "recipe": request.recipe,
        "overrides": list(request.overrides),
        "nodes": request.nodes,
        "gpus_per_node": request.gpus_per_node,
        "host": platform.node(),
        "folder": os.getcwd(),
        "megatron_joy": __version__,
        "python": platform.python_version(),
        "packages": _packages(),
        "code": code_version(),
    }
    write_json(folder / "submission.json", submission)


def submit(recipe: Recipe, jobs: Sequence[Script]) -> list[dict[str, str | None]]:
    """Queues the jobs of a chain, each after the one before; their ids and stages. Raises WorkError as sbatch does."""
    run, queued = Path(recipe.run.folder or ""), list[dict[str, str | None]]()
    folder = launch_folder(run)
    for job in jobs:
        path = folder / (f"job_{job.stage}.sbatch" if job.stage else "job.sbatch")
        path.write_text(job.text, encoding="utf-8")
        after = [f"--dependency=afterok:{queued[-1]['id']}", "--kill-on-invalid-dep=yes"] if queued else []
        try:
            answer = ask("sbatch", "--parsable", *after, str(path))
        except WorkError as error:
            raise WorkError(
                f"{error}; queued so far: {', '.join(str(one['id']) for one in queued) or 'nothing'}"
            ) from None
        queued.append({"id": answer.partition(";")[0], "stage": job.stage})
        write_json(folder / JOBS, {"jobs": queued})
    return queued


def launch(request: Request) -> tuple[Recipe, list[dict[str, str | None]], list[str]]:
    """Checks, snapshots and submits: (the recipe, the queued jobs, notes)."""
    recipe = load_recipe(request.recipe, request.overrides)
    notes = check_request(request, recipe)
    arguments = [str(launch_folder(Path(recipe.run.folder or "")) / SNAPSHOT)]
    jobs = scripts(request, recipe, arguments)
    for job in jobs:
        would_run(job)
    snapshot(request, recipe)
    return recipe, submit(recipe, jobs), notes


def render(request: Request) -> str:
    """The scripts as they would be submitted, but for the recipe, which is named as the user named it."""
    recipe = load_recipe(request.recipe, request.overrides)
    return "\n".join(job.text for job in scripts(request, recipe, [request.recipe, *request.overrides]))


def describe(recipe: Recipe, jobs: Sequence[dict[str, str | None]]) -> str:
    """Where to look, as the user is told."""
    run = recipe.run.folder
    lines = [f"{job['stage'] or run}: job {job['id']}, output in {run}/logs/slurm-{job['id']}.out" for job in jobs]
    return "\n".join([*lines, f"joy status {run} says where it stands; scancel {jobs[0]['id']} stops it, resumable"])


def as_json(recipe: Recipe, jobs: Sequence[dict[str, str | None]], notes: Sequence[str]) -> str:
    """The same for programs."""
    return json.dumps({"run": recipe.run.folder, "jobs": list(jobs), "notes": list(notes)}, indent=2)
