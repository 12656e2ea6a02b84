"""An export that has been checked and can start: what is in each of its files, and how one file is made and proved."""

import hashlib
import math
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron_joy
from megatron_joy.checkpoint.marker import MARKER
from megatron_joy.convert.hf_config import FAMILIES
from megatron_joy.convert.mapping import ConversionPlan, HFTensor, check_parameters, conversion_plan
from megatron_joy.convert.precisions.schemes import Part
from megatron_joy.convert.precisions.table import Precision, left_out, precision_of
from megatron_joy.convert.progress import Advance
from megatron_joy.convert.safetensors_file import DTYPES, Entry, aligned, file_problem, holds, write_file
from megatron_joy.convert.sample import UNSAID, Sample, kind_of
from megatron_joy.convert.source import Source, open_source
from megatron_joy.convert.store import TensorStore
from megatron_joy.convert.verify import FileProof, Written, verify_file
from megatron_joy.errors import UserError, WorkError

MTP_FILE = "mtp-1-of-1.safetensors"  # where the released weights have it, outside the numbering of the others
_PIECE = 1 << 24  # bytes of a tensor in memory at a time, where its rows need nothing of each other


@dataclass(frozen=True)
class ExportOptions:
    """How to write. precision None: the run's; vocabulary None: the model's; tokenizer None: the training data's.

    workers None: by size (`workers_for`). sample: what `verify` compares.
    """

    precision: str | None = None
    family: str = "deepseek_v3"
    max_shard_bytes: int = 5_000_000_000
    vocabulary: int | None = None
    tokenizer: Path | None = None
    verify: bool = True
    sample: Sample = UNSAID
    workers: int | None = None


@dataclass(frozen=True)
class ExportJob:
    """The checkpoint, the plan and the files. Everything that a worker needs follows from (checkpoint, options)."""

    source: Source
    store: TensorStore
    plan: ConversionPlan
    precision: Precision
    left_out: dict[str, str]
    files: dict[str, list[Entry]]
    sample: Sample

    @property
    def bytes(self) -> int:
        """Of all tensors that are written."""
        return sum(entry.bytes for entries in self.files.values() for entry in entries)

    @cached_property
    def weight_of(self) -> dict[str, str]:
        """Stored name -> the tensor of the plan that it belongs to."""
        return {
            stored_name(tensor.name, part): tensor.name
            for tensor in self.plan.tensors
            for part in parts_of(tensor, self.precision, self.left_out)
        }

    @cached_property
    def quantised(self) -> frozenset[str]:
        """The tensors of the plan that are quantised."""
        return frozenset(self.plan.by_name.keys() - self.left_out.keys())

    @cached_property
    def compared(self) -> frozenset[str]:
        """The tensors of the plan that a verification compares; of the rest it checks what is on disk by its hash."""
        sizes: dict[str, int] = {}
        for entry in (entry for entries in self.files.values() for entry in entries):
            weight = self.weight_of[entry.name]
            sizes[weight] = sizes.get(weight, 0) + entry.bytes
        return self.sample.draw(sizes, self.kind)

    def kind(self, name: str) -> str:
        """What tensors are converted alike: the MTP layer's are other parameters than those of the same name."""
        return kind_of(f"{self.plan.by_name[name].key} {name}") + (" quantised" if name in self.quantised else "")

    @property
    def rounded(self) -> bool:
        """Whether fp32 weights become bf16."""
        return any(
            self.store.dtypes[tensor.key].itemsize > DTYPES[dtype_of(tensor, self.precision)][1].itemsize
            for tensor in self.plan.tensors
        )

    def original(self, name: str) -> Tensor:
        """A Hugging Face tensor as the checkpoint has it."""
        tensor = self.plan.by_name[name]
        return self.store.read(tensor.key, tensor.start, tensor.size).view(tensor.shape)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The same, rows [n, ...] after rows, so that a large one is never in memory as a whole."""
        tensor = self.plan.by_name[name]
        axis = len(tensor.start) - len(tensor.shape)  # behind the experts' dimension
        row = self.store.dtypes[tensor.key].itemsize * math.prod(tensor.shape[1:])
        most = max(1, _PIECE // row)
        for first in range(0, tensor.shape[0], most):
            count = min(most, tensor.shape[0] - first)
            start, size = list(tensor.start), list(tensor.size)
            start[axis] += first
            size[axis] = count
            yield self.store.read(tensor.key, start, size).view(count, *tensor.shape[1:])

    def stored(self, name: str) -> dict[str, Iterable[Tensor]]:
        """What is written for a tensor of the plan: pieces by stored name."""
        tensor, scheme = self.plan.by_name[name], self.precision.scheme
        if scheme is None or name in self.left_out:
            dtype = DTYPES[dtype_of(tensor, self.precision)][1]
            return {name: (piece.to(dtype) for piece in self.pieces(name))}
        try:
            parts = scheme.quantise(self.original(name))
        except ValueError as error:
            raise WorkError(f"{self.source.checkpoint.path}: {tensor.key} {error}; take another checkpoint") from None
        return {name.removesuffix("weight") + suffix: [part] for suffix, part in parts.items()}

    def write(self, file: str, folder: Path, earlier: dict[str, str] | None, advance: Advance) -> dict[str, str]:
        """Makes a file; returns the BLAKE3 of each of its tensors.

        earlier: what an earlier start returned for the file; it is kept when it still holds.
        """
        entries = self.files[file]
        if earlier is not None and holds(folder / file, entries, earlier):
            advance(sum(entry.bytes for entry in entries))
            return earlier

        def produce(entry: Entry) -> dict[str, Iterable[Tensor]]:
            return {name: counted(pieces) for name, pieces in self.stored(self.weight_of[entry.name]).items()}

        def counted(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
            for piece in pieces:
                yield piece
                advance(piece.nbytes)

        return write_file(folder / file, entries, produce)

    def verify(self, file: str, folder: Path, digests: dict[str, str], advance: Advance) -> FileProof:
        """Proves a file against the checkpoint (`verify.verify_file`), of a large model the sample's tensors of it."""
        entries = self.files[file]
        compared = [entry for entry in entries if self.weight_of[entry.name] in self.compared]
        if len(compared) < len(entries):
            if (problem := file_problem(folder / file, entries, digests)) is not None:
                raise WorkError(f"{file}: {problem} on disk is not what was written; the export is not kept")
            advance(sum(entry.bytes for entry in entries) - sum(entry.bytes for entry in compared))
        written = Written(
            plan=self.plan,
            precision=self.precision,
            original=self.original,
            stored=self.stored,
            weight_of={entry.name: self.weight_of[entry.name] for entry in compared},
            quantised=self.quantised,
            digests=digests,
        )
        return verify_file(written, folder / file, advance)

    def identity(self, options: ExportOptions) -> dict[str, Any]:
        """All that decides the bytes of the files: an interrupted export with the same is gone on with."""
        marker = (self.source.checkpoint.path / MARKER).read_bytes()
        return {
            "direction": "to-hf",
            "checkpoint": hashlib.sha256(marker).hexdigest(),
            "precision": self.precision.name,
            "vocabulary": self.plan.vocabulary,
            "max_shard_bytes": options.max_shard_bytes,
            "megatron_joy": megatron_joy.__version__,
            "torch": torch.__version__,
        }


def export_job(source: Source, store: TensorStore, options: ExportOptions) -> ExportJob:
    """Plans an export. Raises UserError for an option without meaning and a checkpoint that is not its recipe's."""
    precision = precision_of(options.precision or source.recipe.precision.params_dtype)
    if options.family not in FAMILIES:
        raise UserError(f"--family {options.family}: not a known family; expected {' or '.join(FAMILIES)}")
    imported = source.checkpoint.state.get("imported") or {}  # what `from_hf` padded is cut again
    vocabulary = imported.get("vocab_size") if options.vocabulary is None else options.vocabulary
    plan = conversion_plan(source.recipe.model, vocabulary=vocabulary)
    check_parameters(plan, store.shapes, str(source.checkpoint.path))
    unquantised = left_out(plan, precision)
    files = file_contents(plan, precision, unquantised, options.max_shard_bytes)
    return ExportJob(source, store, plan, precision, unquantised, files, options.sample)


@contextmanager
def open_export(checkpoint: Path, options: ExportOptions) -> Iterator[ExportJob]:
    """The job of a checkpoint folder that has been checked, opened anew: what each worker does."""
    source = open_source(checkpoint)
    with TensorStore(source.checkpoint) as store:
        yield export_job(source, store, options)


def dtype_of(tensor: HFTensor, precision: Precision) -> str:
    """The dtype that a tensor which is not quantised is written in: router biases stay fp32."""
    return "fp32" if tensor.kind == "fp32" else precision.rest


def stored_name(weight: str, part: Part) -> str:
    """`a.weight` and 'weight_scale' -> `a.weight_scale`; without a suffix the weight's own name."""
    return weight.removesuffix("weight") + part.suffix if part.suffix else weight


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
            parts = parts_of(tensor, precision, unquantised)
            yield [Entry(stored_name(tensor.name, part), part.dtype, part.shape) for part in parts]


def parts_of(tensor: HFTensor, precision: Precision, unquantised: Container[str]) -> tuple[Part, ...]:
    """What is stored of a tensor; one part without a suffix where it is not quantised."""
    if precision.scheme is None or tensor.name in unquantised:
        return (Part("", dtype_of(tensor, precision), tensor.shape),)
    return precision.scheme.parts(tensor.shape)
