"""An import that has been checked and can start: which parameters go to which file, how one is made and proved."""

import hashlib
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

import megatron_joy
from megatron_joy.checkpoint.boxes import Index, LazyBoxes
from megatron_joy.checkpoint.find import file_problem
from megatron_joy.checkpoint.marker import Checkpoint, FileEntry, read_marker
from megatron_joy.checkpoint.storage import SavePlanner
from megatron_joy.checkpoint.writing import file_of_rank, write_streamed
from megatron_joy.convert.dequantised import open_folder
from megatron_joy.convert.hf_config import CONFIG, differing_keys, model_of, read_config
from megatron_joy.convert.hf_folder import HFFolder, only_dtype
from megatron_joy.convert.mapping import ConversionPlan, HFTensor, check_tensors, conversion_plan
from megatron_joy.convert.progress import Advance
from megatron_joy.convert.safetensors_file import elements_of
from megatron_joy.convert.sample import UNSAID, Sample
from megatron_joy.convert.store import TensorStore
from megatron_joy.errors import UserError, WorkError
from megatron_joy.recipe import Recipe, dump_recipe
from megatron_joy.recipe.derive import derive
from megatron_joy.recipe.schema import DataSection, LayoutSection, ModelSection, PrecisionSection, TrainSection
from megatron_joy.recipe.validate import validate

DTYPE_NAMES: dict[torch.dtype, Literal["fp32", "bf16"]] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Without this Megatron-core's own loader doesn't take the folder (dist_checkpointing/serialization.py).
_COMMON_STATE = "common_state/shard_0_1"
FILE_BYTES = 2_000_000_000  # a file ends with the parameter that reaches it
_PIECE = 1 << 24  # bytes of a parameter in memory at a time


@dataclass(frozen=True)
class Part:
    """A box of a parameter and where its elements come from: rows of a tensor from `row` on, or None for padding."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    tensor: HFTensor | None
    row: int = 0


@dataclass(frozen=True)
class ImportJob:
    """The folder, the plan and the recipe. All that a worker needs follows from the arguments of `import_job`."""

    folder: HFFolder
    plan: ConversionPlan
    recipe: Recipe
    dtype: torch.dtype
    file_bytes: int = FILE_BYTES
    sample: Sample = UNSAID

    def dtype_of(self, key: str) -> torch.dtype:
        """What a parameter is stored in: router biases stay fp32."""
        return torch.float32 if self.plan.by_key[key][0].kind == "fp32" else self.dtype

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each parameter."""
        return {key: math.prod(shape) * self.dtype_of(key).itemsize for key, shape in self.plan.parameters.items()}

    @property
    def bytes(self) -> int:
        """Of all parameters."""
        return sum(self.sizes.values())

    @cached_property
    def compared(self) -> frozenset[str]:
        """The parameters that a verification compares; of the rest it checks what is on disk by its file's hash."""
        return self.sample.draw(self.sizes)

    @cached_property
    def files(self) -> dict[str, list[str]]:
        """Names of the checkpoint's files (as torch.distributed.checkpoint calls a rank's) and their parameters."""
        groups: list[list[str]] = []
        size = self.file_bytes
        for key in self.plan.parameters:
            if size >= self.file_bytes:
                groups.append([])
                size = 0
            groups[-1].append(key)
            size += self.sizes[key]
        return {file_of_rank(i): group for i, group in enumerate(groups)}

    def parts(self, key: str) -> Iterator[Part]:
        """The boxes of a parameter, none larger than a piece."""
        for tensor in self.plan.by_key[key]:
            yield from self._cut(Part(tensor.start, tensor.size, tensor))
        rows, inner = self.plan.parameters[key][0], self.plan.unpadded[key][0]
        if rows > inner:
            rest = self.plan.parameters[key][1:]
            yield from self._cut(Part((inner, *(0 for _ in rest)), (rows - inner, *rest), None))

    def _cut(self, part: Part) -> Iterator[Part]:
        axis = len(part.size) - len(part.tensor.shape) if part.tensor else 0  # behind the experts' dimension
        most = max(1, _PIECE // (self.dtype.itemsize * math.prod(part.size[axis + 1 :])))
        for row in range(0, part.size[axis], most):
            start, size = list(part.start), list(part.size)
            start[axis] += row
            size[axis] = min(most, part.size[axis] - row)
            yield Part(tuple(start), tuple(size), part.tensor, row)

    def load(self, part: Part, dtype: torch.dtype) -> Tensor:
        """The elements of a box."""
        if part.tensor is None:
            return torch.zeros(part.size, dtype=dtype)
        axis = len(part.size) - len(part.tensor.shape)
        return self.folder.rows(part.tensor.name, part.row, part.size[axis]).view(part.size).to(dtype)

    def write(self, file: str, folder: Path, earlier: dict[str, Any] | None, advance: Advance) -> dict[str, Any]:
        """Makes a file; returns its size, its BLAKE3 and what it holds where, as JSON.

        earlier: what an earlier start returned for the file; it is kept when it still holds.
        """
        if (
            earlier is not None
            and file_problem(folder, FileEntry(file, earlier["bytes"], earlier["blake3"]), True) is None
        ):
            advance(earlier["bytes"])
            return earlier
        planner, plan = self._planned(file, advance)
        written = write_streamed(folder, file, planner.finish_plan(plan), planner)
        (entry,) = written.files
        results = [_as_json(result) for result in written.places]
        return {"bytes": entry.bytes, "blake3": entry.blake3, "results": results}

    def metadata(self) -> Metadata:
        """The checkpoint's index, without the places."""
        plans = [self._planned(file, lambda done: None)[1] for file in self.files]
        return SavePlanner().create_global_plan(plans)[1]

    def _planned(self, file: str, advance: Advance) -> tuple[SavePlanner, SavePlan]:
        """A planner that has the tensors of a file, and the plan of writing them."""
        tensors: dict[str, Any] = {key: self._lazy(key, advance) for key in self.files[file]}
        if file == file_of_rank(0):
            tensors[_COMMON_STATE] = common = io.BytesIO()
            torch.save([{"iteration": 0}], common)
        planner = SavePlanner()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            planner.set_up_planner(tensors, is_coordinator=True)
            return planner, planner.create_local_plan()

    def _lazy(self, key: str, advance: Advance) -> LazyBoxes:
        """A parameter whose elements are read when they are written."""
        dtype, parts = self.dtype_of(key), {part.start: part for part in self.parts(key)}

        def read(offset: Index, size: Index) -> Tensor:
            tensor = self.load(parts[offset], dtype)
            advance(tensor.nbytes)
            return tensor

        places = [(part.start, part.size) for part in parts.values()]
        return LazyBoxes.of(self.plan.parameters[key], dtype, places, read)

    def verify(self, file: str, folder: Path, advance: Advance) -> None:
        """Reads the parameters of a file of a committed checkpoint back and compares their bits with the folder's.

        Of a large model those of the sample, and the file's hash.
        """
        marker = read_marker(folder)
        compared = [key for key in self.files[file] if key in self.compared]
        if len(compared) < len(self.files[file]):
            (entry,) = [entry for entry in marker.files if entry.name == file]
            if (problem := file_problem(folder, entry, True)) is not None:
                raise WorkError(f"{problem}; the checkpoint is not kept")
            advance(sum(self.sizes[key] for key in self.files[file]) - sum(self.sizes[key] for key in compared))
        with TensorStore(Checkpoint(folder, marker)) as store:
            for key in compared:
                for part in self.parts(key):
                    found = store.read(key, part.start, part.size)
                    advance(found.nbytes)
                    if elements_of(found) != elements_of(self.load(part, found.dtype)):
                        raise WorkError(f"{file}: {key} at {list(part.start)} is not the folder's; not kept")

    def identity(self) -> dict[str, Any]:
        """All that decides the bytes of the files: an interrupted import with the same is gone on with."""
        paths = [self.folder.folder / name for name in sorted({CONFIG, *self.folder.file_of.values()})]
        return {
            "direction": "from-hf",
            "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
            "file_bytes": self.file_bytes,
            "recipe": hashlib.sha256(dump_recipe(self.recipe).encode()).hexdigest(),
            "megatron_joy": megatron_joy.__version__,
            "torch": torch.__version__,
        }


def _as_json(result: WriteResult) -> dict[str, Any]:
    index, info = result.index, result.storage_data
    return {
        "key": index.fqn,
        "start": list(index.offset) if index.offset is not None else None,
        "index": index.index,
        "size": result.size_in_bytes,
        "file": info.relative_path,
        "first": info.offset,
        "length": info.length,
    }


def result_of(row: dict[str, Any]) -> WriteResult:
    """What torch's writer returned, from its JSON."""
    start = torch.Size(row["start"]) if row["start"] is not None else None
    return WriteResult(
        MetadataIndex(row["key"], start, row["index"]),
        row["size"],
        _StorageInfo(row["file"], row["first"], row["length"]),
    )


def import_job(path: Path, recipe: Recipe | None, file_bytes: int = FILE_BYTES, sample: Sample = UNSAID) -> ImportJob:
    """Plans an import. Raises UserError for a folder that is not whole, or of another model than the recipe's."""
    config_path = path / CONFIG
    config = read_config(path)
    model = model_of(config, config_path)
    if recipe is not None and (differing := differing_keys(recipe.model, model)):
        raise UserError(f"recipe {recipe.name} is of another model than {config_path}: {', '.join(differing)}")
    plan = conversion_plan(recipe.model if recipe is not None else model, vocabulary=model.vocab_size)
    folder = open_folder(path, config)
    check_tensors(plan, folder.shapes, str(path), folder.file_of)
    weights = [tensor.name for tensor in plan.tensors if tensor.kind == "weight" and tensor.name in folder.shapes]
    dtype = only_dtype(folder.dtypes, weights, path)
    if recipe is None:
        recipe = _made_up_recipe(model, dtype, config_path)
    elif DTYPE_NAMES[dtype] == "fp32" and recipe.precision.params_dtype == "bf16":
        raise UserError(
            f"recipe {recipe.name}: precision.params_dtype bf16 would round the fp32 weights of {path}; set it to fp32"
        )
    return ImportJob(folder, plan, recipe, dtype, file_bytes, sample)


@contextmanager
def open_import(path: Path, recipe: Recipe | None, file_bytes: int, sample: Sample) -> Iterator[ImportJob]:
    """The job of a folder that has been checked, opened anew: what each worker does."""
    yield import_job(path, recipe, file_bytes, sample)


def check_copies(job: ImportJob) -> None:
    """Refuses (UserError) a copy that isn't one: it would be lost without a word."""
    folder = job.folder
    for tensor in job.plan.tensors:
        if tensor.copy_of is None or tensor.name not in folder.shapes:
            continue
        for part in job._cut(Part(tensor.start, tensor.size, tensor)):
            one, other = (folder.rows(name, part.row, part.size[0]) for name in (tensor.name, tensor.copy_of))
            if elements_of(one) != elements_of(other):
                raise UserError(
                    f"{folder.folder / folder.file_of[tensor.name]}: {tensor.name} differs from {tensor.copy_of}, of "
                    "which it must be a copy; there is no place for a second head"
                )


def _made_up_recipe(model: ModelSection, dtype: torch.dtype, where: Path) -> Recipe:
    """A recipe that says what the weights are and next to nothing about training them."""
    recipe = derive(
        Recipe(
            name="imported",
            description="Made from a Hugging Face config.json; training needs a recipe of its own.",
            model=model,
            layout=LayoutSection(),
            precision=PrecisionSection(params_dtype=DTYPE_NAMES[dtype]),
            data=DataSection(sequence_length=min(4096, model.max_position_embeddings)),
            train=TrainSection(steps=1, global_batch_size=1),
        )
    )
    if problems := validate(recipe, {}):
        raise UserError(f"{where}: no model that can be trained: {'; '.join(problems)}")
    return recipe
