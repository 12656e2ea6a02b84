"""A Hugging Face folder as a checkpoint of weights that any layout resumes from, streamed tensor by tensor."""

import hashlib
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import torch

import megatron_joy
from megatron_joy.checkpoint.find import entry_of
from megatron_joy.checkpoint.marker import RECIPE, FileEntry, Marker, step_of, write_marker
from megatron_joy.checkpoint.storage import Writer
from megatron_joy.checkpoint.work_folder import (
    Work,
    refuse_existing,
    refuse_full_disk,
    work_folder,
    write_run_recipe,
)
from megatron_joy.convert.hf_config import CONFIG
from megatron_joy.convert.import_job import (
    DTYPE_NAMES,
    FILE_BYTES,
    ImportJob,
    check_copies,
    import_job,
    open_import,
    result_of,
)
from megatron_joy.convert.progress import Phases, silent
from megatron_joy.convert.provenance import PROVENANCE, import_provenance
from megatron_joy.convert.sample import UNSAID, Sample
from megatron_joy.convert.workers import Crew, processes
from megatron_joy.errors import UserError
from megatron_joy.recipe import Recipe, dump_recipe

METADATA = "metadata.json"
# Without these two Megatron-core's own loader doesn't take the folder (dist_checkpointing/core.py).
_MEGATRON_METADATA = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_OVERHEAD = 1.02  # each tensor lies in a small archive of its own


@dataclass(frozen=True)
class Import:
    """What was written. compared: parameters, when `verified`; seed: of their sample, None where it is all of them."""

    checkpoint: Path
    source: Path
    precision: str
    parameters: int
    tensors: int
    bytes: int
    workers: int
    verified: bool
    compared: int
    seed: int | None
    recipe: str
    run_recipe: Path | None
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def from_hf(
    folder: Path,
    out: Path,
    recipe: Recipe | None = None,
    verify: bool = True,
    phases: Phases = silent,
    workers: int | None = None,
    file_bytes: int = FILE_BYTES,
    crew: Crew = processes,
    sample: Sample = UNSAID,
) -> Import:
    """Writes the folder's weights as the new checkpoint `out` of step 0, in the dtype they have.

    recipe: what they are to be trained with; its model must be the folder's (its vocabulary may be padded: new rows are
    zeros). None: a recipe is made from config.json. With a recipe and `out` = RUN/checkpoints/step_00000000 the recipe
    becomes RUN's as well, so that `joy pretrain` goes on from there. file_bytes: a file ends with the parameter that
    reaches it; training's loader takes any. sample: what `verify` compares. Killed, it goes on from the files that are
    whole when it is called again. Raises UserError before anything is written, WorkError when the disk refuses or a
    tensor on disk is not the folder's.
    """
    refuse_existing(out)
    if step_of(out.name) not in (0, None):
        raise UserError(f"{out}: imported weights are of step 0; name it {out.with_name('step_00000000')}")
    job = import_job(folder, recipe, file_bytes, sample)
    check_copies(job)
    staff = crew(job, partial(open_import, folder, recipe, file_bytes, sample), workers)
    refuse_full_disk(out, int(job.bytes * _OVERHEAD))
    with work_folder(out, job.identity()) as work, staff as pool:
        calls = [(name, work.folder, work.record_of(name)) for name in job.files]
        _commit(job, work, pool.each("write", calls, phases("writing", job.bytes), work.keep))
        if verify:
            pool.each("verify", [(name, work.folder) for name in job.files], phases("reading back", job.bytes))
        told = orjson.dumps(import_provenance(job, verify), option=orjson.OPT_INDENT_2)
        (work.folder / PROVENANCE).write_bytes(told)
    return Import(
        checkpoint=out,
        source=folder,
        precision=DTYPE_NAMES[job.dtype],
        parameters=len(job.plan.parameters),
        tensors=len(job.plan.tensors),
        bytes=job.bytes,
        workers=pool.count,
        verified=verify,
        compared=len(job.compared) if verify else 0,
        seed=sample.seed if verify and len(job.compared) < len(job.plan.parameters) else None,
        recipe=job.recipe.name,
        run_recipe=write_run_recipe(out, dump_recipe(recipe).encode()) if recipe is not None else None,
        notes=(work.note,) if work.note else (),
    )


def _commit(job: ImportJob, work: Work, records: list[dict[str, Any]]) -> None:
    """Index, recipe and marker: what makes the files a checkpoint."""
    writer = Writer(work.folder)
    # Through JSON once, so that the index, a pickle, doesn't depend on which of its strings are one object.
    records = orjson.loads(orjson.dumps(records))
    writer.finish(job.metadata(), [[result_of(row) for row in record["results"]] for record in records])
    text = dump_recipe(job.recipe).encode()
    (work.folder / RECIPE).write_bytes(text)
    (work.folder / METADATA).write_bytes(orjson.dumps(_MEGATRON_METADATA))
    small = [work.folder / RECIPE, work.folder / METADATA]
    entries = list(map(entry_of, small))
    entries += [FileEntry(n, r["bytes"], r["blake3"]) for n, r in zip(job.files, records, strict=True)]
    marker = Marker(
        step=0,
        attempt=0,
        time=time.time(),
        world_size=1,
        layout=job.recipe.layout.model_dump(),
        versions={
            "megatron_joy": megatron_joy.__version__,
            "megatron_core": version("megatron-core"),
            "torch": torch.__version__,
            "safetensors": version("safetensors"),
        },
        recipe_sha256=hashlib.sha256(text).hexdigest(),
        optimizer_step=None,
        state=_state(job),
        files=tuple(sorted([*writer.fs.files.values(), *entries], key=lambda entry: entry.name)),
    )
    write_marker(work.folder, marker)


def _state(job: ImportJob) -> dict[str, Any]:
    """Where the weights are from, in the place where the training loop keeps how far it is."""
    config = (job.folder.folder / CONFIG).read_bytes()
    return {
        "imported": {
            "folder": job.folder.folder.absolute().name,
            "config_sha256": hashlib.sha256(config).hexdigest(),
            "vocab_size": job.plan.vocabulary,
        }
    }
