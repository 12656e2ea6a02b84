"""A checkpoint as a Hugging Face folder: read, converted and written tensor by tensor, then proved."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_joy.checkpoint.work_folder import Work, refuse_existing, refuse_full_disk, work_folder
from megatron_joy.convert.export_job import ExportJob, ExportOptions, export_job, open_export
from megatron_joy.convert.hf_config import CONFIG, GENERATION_CONFIG, SpecialTokens, generation_config, model_config
from megatron_joy.convert.hf_folder import INDEX
from megatron_joy.convert.precisions.config import KEY, quantization_config
from megatron_joy.convert.progress import Phases, silent
from megatron_joy.convert.provenance import CARD, PROVENANCE, data_read, model_card, provenance
from megatron_joy.convert.source import TOKENIZER_FILES, TokenizerFolder, check_vocabulary, open_source, tokenizer_of
from megatron_joy.convert.store import TensorStore
from megatron_joy.convert.verify import Verification, verification_of, with_logits
from megatron_joy.convert.workers import Crew, Pool, processes

_SMALL_FILES = 64 << 20  # room for everything that is not a tensor


@dataclass(frozen=True)
class Export:
    """What was written. `verification` is None when it was turned off."""

    folder: Path
    checkpoint: Path
    step: int
    family: str
    precision: str
    files: tuple[str, ...]
    tensors: int
    bytes: int
    workers: int
    verification: Verification | None
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "folder": str(self.folder),
            "checkpoint": str(self.checkpoint),
            "step": self.step,
            "family": self.family,
            "precision": self.precision,
            "files": list(self.files),
            "tensors": self.tensors,
            "bytes": self.bytes,
            "workers": self.workers,
            "verification": self.verification.as_json() if self.verification else None,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Texts:
    """The tokenizer that goes along, and its special tokens."""

    folder: TokenizerFolder | None
    special: SpecialTokens


def to_hf(path: Path, out: Path, options: ExportOptions, phases: Phases = silent, crew: Crew = processes) -> Export:
    """Writes the checkpoint (or a run's newest whole one) as the new folder `out`.

    Killed, it goes on from the files that are whole when it is called again. Raises UserError before anything is
    written (no whole checkpoint, a model that is not its recipe's, a folder that is there, a full disk), WorkError when
    the disk refuses or the verification finds a difference; nothing is left then.
    """
    refuse_existing(out)
    if options.verify:
        phases("reading the checkpoint's files", None)
    source = open_source(path, full=options.verify)
    with TensorStore(source.checkpoint) as store:
        job = export_job(source, store, options)
        texts, data = _texts(job, options), data_read(source.checkpoint)
        pool = crew(job, partial(open_export, source.checkpoint.path, options), options.workers)
        refuse_full_disk(out, job.bytes + _SMALL_FILES)
        with work_folder(out, job.identity(options)) as work:
            with pool as workers:
                digests = _write(job, work, workers, phases)
                _write_small_files(job, work.folder, options.family, texts)
                proofs = _prove(job, work, workers, digests, phases) if options.verify else None
            flat = {name: digest for of_file in digests.values() for name, digest in of_file.items()}
            if proofs is not None:
                proofs = _compare_logits(job, work.folder, proofs, texts, phases)
            told = provenance(job, options, data, flat, proofs)
            _write_json(work.folder / PROVENANCE, told)
            (work.folder / CARD).write_text(model_card(job, told), encoding="utf-8")
        return Export(
            folder=out,
            checkpoint=source.checkpoint.path,
            step=source.checkpoint.step,
            family=options.family,
            precision=job.precision.name,
            files=tuple(job.files),
            tensors=len(job.plan.tensors),
            bytes=job.bytes,
            workers=workers.count,
            verification=proofs,
            notes=(*source.notes, *([work.note] if work.note else []), *_notes(job, texts)),
        )


def _texts(job: ExportJob, options: ExportOptions) -> _Texts:
    folder = tokenizer_of(job.source.recipe, options.tokenizer)
    if folder is None:
        return _Texts(None, SpecialTokens())
    tokenizer = folder.load()
    check_vocabulary(folder, tokenizer, job.plan.vocabulary)
    return _Texts(folder, folder.special_tokens(tokenizer))


def _write(job: ExportJob, work: Work, pool: Pool, phases: Phases) -> dict[str, dict[str, str]]:
    """The BLAKE3 of each tensor, file by file."""
    calls = [(name, work.folder, work.record_of(name)) for name in job.files]
    written = pool.each("write", calls, phases("writing", job.bytes), work.keep)
    weight_map = {entry.name: name for name, entries in job.files.items() for entry in entries}
    index = {"metadata": {"total_size": job.bytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(work.folder / INDEX, index)
    return dict(zip(job.files, written, strict=True))


def _prove(job: ExportJob, work: Work, pool: Pool, digests: dict[str, dict[str, str]], phases: Phases) -> Verification:
    calls = [(name, work.folder, digests[name]) for name in job.files]
    proofs = pool.each("verify", calls, phases("reading back", job.bytes))
    return verification_of(proofs, len(job.weight_of), job.precision, job.sample.seed)


def _compare_logits(job: ExportJob, folder: Path, found: Verification, texts: _Texts, phases: Phases) -> Verification:
    phases("comparing logits with transformers", None)
    tokenizer = texts.folder.load() if texts.folder else None
    return with_logits(found, folder, job.source.checkpoint.path, job.plan, job.precision, tokenizer)


def _write_small_files(job: ExportJob, folder: Path, family: str, texts: _Texts) -> None:
    config = model_config(job.plan.model, family, job.precision.rest, job.plan.vocabulary, texts.special)
    if (quantised := quantization_config(job.precision, job.left_out)) is not None:
        config[KEY] = quantised
    _write_json(folder / CONFIG, config)
    _write_json(folder / GENERATION_CONFIG, generation_config(texts.special))
    if texts.folder is not None:
        for path in (texts.folder.path / name for name in TOKENIZER_FILES):
            if path.is_file():
                (folder / path.name).write_bytes(path.read_bytes())


def _notes(job: ExportJob, texts: _Texts) -> Sequence[str]:
    notes = []
    if texts.folder is None:
        notes.append("the recipe names no data, so no tokenizer was written; --tokenizer names one")
    if job.precision.scheme is not None:
        kept = sum(job.plan.by_name[name].elements for name in job.left_out)
        share = kept / sum(tensor.elements for tensor in job.plan.tensors)
        notes.append(f"{share:.1%} of the numbers were not quantised; {PROVENANCE} lists them with the reasons")
    elif job.rounded:
        notes.append("fp32 weights were rounded to bf16")
    if job.plan.model.rms_norm_eps != 1e-6:
        notes.append(
            f"rms_norm_eps is {job.plan.model.rms_norm_eps}: transformers has 1e-6 fixed in the norms of the latents"
        )
    return notes


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
