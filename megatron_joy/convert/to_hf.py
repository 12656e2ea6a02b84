"""A checkpoint as a Hugging Face folder: read, converted and written tensor by tensor, then proved."""

import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron_joy
from megatron_joy.convert.folder import new_folder, refuse_existing, refuse_full_disk
from megatron_joy.convert.hf_config import CONFIG, GENERATION_CONFIG, SpecialTokens, generation_config, model_config
from megatron_joy.convert.hf_folder import INDEX
from megatron_joy.convert.mapping import ConversionPlan, HFTensor, check_parameters, conversion_plan
from megatron_joy.convert.precisions.config import KEY, quantization_config
from megatron_joy.convert.precisions.schemes import Part
from megatron_joy.convert.precisions.table import Precision, left_out, precision_of
from megatron_joy.convert.progress import Advance, Phases, silent
from megatron_joy.convert.safetensors_file import DTYPES, Entry, aligned, write_file
from megatron_joy.convert.source import (
    TOKENIZER_FILES,
    Source,
    TokenizerFolder,
    check_vocabulary,
    open_source,
    tokenizer_of,
)
from megatron_joy.convert.store import TensorStore
from megatron_joy.convert.verify import Verification, Written, verify_folder
from megatron_joy.errors import WorkError

PROVENANCE = "joy_conversion.json"
MTP_FILE = "mtp-1-of-1.safetensors"  # where the released weights have it, outside the numbering of the others
_SMALL_FILES = 64 << 20  # room for everything that is not a tensor


@dataclass(frozen=True)
class ExportOptions:
    """How to write. precision None: the run's; vocabulary None: the model's; tokenizer None: the training data's."""

    precision: str | None = None
    family: str = "deepseek_v3"
    max_shard_bytes: int = 5_000_000_000
    vocabulary: int | None = None
    tokenizer: Path | None = None
    verify: bool = True


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
            "verification": self.verification.as_json() if self.verification else None,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Job:
    """An export that has been checked and can start."""

    source: Source
    store: TensorStore
    plan: ConversionPlan
    options: ExportOptions
    precision: str
    tokenizer: TokenizerFolder | None
    special: SpecialTokens
    row: Precision
    left_out: dict[str, str]
    files: dict[str, list[Entry]]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entries in self.files.values() for entry in entries)

    @property
    def rounded(self) -> bool:
        """Whether fp32 weights become bf16."""
        return any(self.rounds(tensor) for tensor in self.plan.tensors)

    def rounds(self, tensor: HFTensor) -> bool:
        return self.store.dtypes[tensor.key].itemsize > DTYPES[dtype_of(tensor, self.precision)][1].itemsize

    def original(self, name: str) -> Tensor:
        """A Hugging Face tensor as the checkpoint has it."""
        tensor = self.plan.by_name[name]
        return self.store.read(tensor.key, tensor.start, tensor.size).view(tensor.shape)

    def stored(self, name: str) -> dict[str, Tensor]:
        """What is written for a tensor of the plan, by stored name."""
        tensor, scheme = self.plan.by_name[name], self.row.scheme
        if scheme is None or name in self.left_out:
            return {name: self.original(name).to(DTYPES[dtype_of(tensor, self.precision)][1])}
        try:
            parts = scheme.quantise(self.original(name).float())
        except ValueError as error:
            raise WorkError(f"{self.source.checkpoint.path}: {tensor.key} {error}; take another checkpoint") from None
        return {stored_name(name, suffix): part for suffix, part in parts.items()}


def dtype_of(tensor: HFTensor, precision: str) -> str:
    """The dtype that a tensor which is not quantised is written in: router biases stay fp32."""
    return "fp32" if tensor.kind == "fp32" else precision_of(precision).rest


def stored_name(weight: str, suffix: str) -> str:
    """`a.weight` and 'weight_scale' -> `a.weight_scale`."""
    return weight.removesuffix("weight") + suffix


def to_hf(path: Path, out: Path, options: ExportOptions, phases: Phases = silent) -> Export:
    """Writes the checkpoint (or a run's newest whole one) as the new folder `out`.

    Raises UserError before anything is written (no whole checkpoint, a model that is not its recipe's, a folder that is
    there, a full disk), WorkError when the disk refuses or the verification finds a difference; nothing is left then.
    """
    refuse_existing(out)
    if options.verify:
        phases("reading the checkpoint's files", None)
    source = open_source(path, full=options.verify)
    with TensorStore(source.checkpoint) as store:
        job = _prepare(source, store, options)
        refuse_full_disk(out, job.bytes + _SMALL_FILES)
        with new_folder(out) as folder:
            digests = _write_tensors(job, folder, phases("writing", job.bytes))
            _write_small_files(job, folder)
            verification = _verify(job, folder, digests, phases) if options.verify else None
            _write_json(folder / PROVENANCE, _provenance(job, digests, verification))
        return Export(
            folder=out,
            checkpoint=source.checkpoint.path,
            step=source.checkpoint.step,
            family=options.family,
            precision=job.precision,
            files=tuple(job.files),
            tensors=len(job.plan.tensors),
            bytes=job.bytes,
            verification=verification,
            notes=(*source.notes, *_notes(job)),
        )


def _prepare(source: Source, store: TensorStore, options: ExportOptions) -> _Job:
    precision = options.precision or source.recipe.precision.params_dtype
    row = precision_of(precision)
    imported = source.checkpoint.state.get("imported") or {}  # what `from_hf` padded is cut again
    plan = conversion_plan(source.recipe.model, vocabulary=options.vocabulary or imported.get("vocab_size"))
    check_parameters(plan, store.shapes, str(source.checkpoint.path))
    folder = tokenizer_of(source.recipe, options.tokenizer)
    special = SpecialTokens()
    if folder is not None:
        tokenizer = folder.load()
        check_vocabulary(folder, tokenizer, plan.vocabulary)
        special = folder.special_tokens(tokenizer)
    # Asked for here so that an unknown family is refused before anything is written.
    model_config(plan.model, options.family, row.rest, plan.vocabulary, special)
    unquantised = left_out(plan, row)
    files = file_contents(plan, row, unquantised, options.max_shard_bytes)
    return _Job(source, store, plan, options, precision, folder, special, row, unquantised, files)


def file_contents(
    plan: ConversionPlan, precision: Precision, unquantised: Container[str], max_shard_bytes: int
) -> dict[str, list[Entry]]:
    """Which tensors go to which file, in the order in which they lie there; a weight and its scales stay together."""
    shards: list[list[Entry]] = []
    room = 0
    for together in _entries(plan, precision, unquantised, "model"):
        size = sum(entry.bytes for entry in together)
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1] += together
        room -= size
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": aligned(shard) for i, shard in enumerate(shards, 1)}
    predictor = [entry for together in _entries(plan, precision, unquantised, "mtp") for entry in together]
    return files | ({MTP_FILE: aligned(predictor)} if predictor else {})


def _entries(
    plan: ConversionPlan, precision: Precision, unquantised: Container[str], file: str
) -> Iterator[list[Entry]]:
    for tensor in plan.tensors:
        if tensor.file == file:
            yield [
                Entry(stored_name(tensor.name, part.suffix), part.dtype, part.shape)
                if part.suffix
                else Entry(tensor.name, part.dtype, part.shape)
                for part in parts_of(tensor, precision, unquantised)
            ]


def parts_of(tensor: HFTensor, precision: Precision, unquantised: Container[str]) -> tuple[Part, ...]:
    """What is stored of a tensor; one part without a suffix where it is not quantised."""
    if precision.scheme is None or tensor.name in unquantised:
        return (Part("", dtype_of(tensor, precision.name), tensor.shape),)
    return precision.scheme.parts(tensor.shape)


def _verify(job: _Job, folder: Path, digests: dict[str, str], phases: Phases) -> Verification:
    written = Written(
        folder=folder,
        checkpoint=job.source.checkpoint.path,
        plan=job.plan,
        precision=job.row,
        original=job.original,
        stored=job.stored,
        weight_of=_weight_of(job),
        quantised=frozenset(job.plan.by_name.keys() - job.left_out.keys()) if job.row.scheme else frozenset(),
        digests=digests,
    )
    return verify_folder(written, job.tokenizer.load() if job.tokenizer else None, phases)


def _weight_of(job: _Job) -> dict[str, str]:
    """Stored name -> the tensor of the plan that it belongs to."""
    found = {}
    for tensor in job.plan.tensors:
        for part in parts_of(tensor, job.row, job.left_out):
            found[stored_name(tensor.name, part.suffix) if part.suffix else tensor.name] = tensor.name
    return found


def _write_tensors(job: _Job, folder: Path, advance: Advance) -> dict[str, str]:
    weight_of = _weight_of(job)

    def produce(entry: Entry) -> dict[str, Tensor]:
        stored = job.stored(weight_of[entry.name])
        advance(sum(tensor.nbytes for tensor in stored.values()))
        return stored

    digests: dict[str, str] = {}
    for name, entries in job.files.items():
        digests |= write_file(folder / name, entries, produce)
    weight_map = {entry.name: name for name, entries in job.files.items() for entry in entries}
    index = {"metadata": {"total_size": job.bytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX, index)
    return digests


def _write_small_files(job: _Job, folder: Path) -> None:
    config = model_config(job.plan.model, job.options.family, job.row.rest, job.plan.vocabulary, job.special)
    if (quantised := quantization_config(job.row, job.left_out)) is not None:
        config[KEY] = quantised
    _write_json(folder / CONFIG, config)
    _write_json(folder / GENERATION_CONFIG, generation_config(job.special))
    if job.tokenizer is not None:
        for path in (job.tokenizer.path / name for name in TOKENIZER_FILES):
            if path.is_file():
                (folder / path.name).write_bytes(path.read_bytes())


def _provenance(job: _Job, digests: dict[str, str], verification: Verification | None) -> dict[str, Any]:
    """Where the folder is from and what is in it."""
    marker = job.source.checkpoint.marker
    weight_of = _weight_of(job)
    return {
        "format_version": 1,
        "direction": "to-hf",
        "made_by": {
            "megatron_joy": megatron_joy.__version__,
            "torch": torch.__version__,
            "safetensors": version("safetensors"),
        },
        "checkpoint": {
            "run": job.source.recipe.name,
            "step": marker.step,
            "progress": marker.state.get("progress"),
            "recipe_sha256": marker.recipe_sha256,
            "written": marker.time,
            "layout": marker.layout,
        },
        "family": job.options.family,
        "precision": job.precision,
        "rounded": job.rounded,
        "vocab_size": job.plan.vocabulary,
        "verification": verification.as_json() if verification else None,
        "quantised": sorted(job.plan.by_name.keys() - job.left_out.keys()) if job.row.scheme else [],
        "not_quantised": job.left_out if job.row.scheme else {},
        "tensors": {
            entry.name: {
                "file": file,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "sha256": digests[entry.name],
                "megatron": job.plan.by_name[weight_of[entry.name]].key,
            }
            for file, entries in job.files.items()
            for entry in entries
        },
    }


def _notes(job: _Job) -> Sequence[str]:
    notes = []
    if job.tokenizer is None:
        notes.append("the recipe names no data, so no tokenizer was written; --tokenizer names one")
    if job.row.scheme is not None:
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
