"""A Hugging Face folder as a checkpoint of weights that any layout resumes from, streamed tensor by tensor."""

import hashlib
import io
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import orjson
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

import megatron_joy
from megatron_joy.checkpoint.find import sha256_of
from megatron_joy.checkpoint.marker import RECIPE, Checkpoint, FileEntry, Marker, read_marker, step_of, write_marker
from megatron_joy.checkpoint.storage import SavePlanner, Writer
from megatron_joy.convert.dequantised import open_folder
from megatron_joy.convert.folder import new_folder, refuse_existing, refuse_full_disk
from megatron_joy.convert.hf_config import CONFIG, differing_keys, model_of, read_config
from megatron_joy.convert.hf_folder import HFFolder, only_dtype
from megatron_joy.convert.mapping import ConversionPlan, HFTensor, check_tensors, conversion_plan
from megatron_joy.convert.progress import Advance, Phases, silent
from megatron_joy.convert.safetensors_file import elements_of
from megatron_joy.convert.source import CHECKPOINTS
from megatron_joy.convert.store import TensorStore
from megatron_joy.data.atomic import write_atomically
from megatron_joy.errors import UserError, WorkError
from megatron_joy.recipe import Recipe, dump_recipe
from megatron_joy.recipe.derive import derive
from megatron_joy.recipe.schema import DataSection, LayoutSection, ModelSection, PrecisionSection, TrainSection
from megatron_joy.recipe.validate import validate

DTYPE_NAMES: dict[torch.dtype, Literal["fp32", "bf16"]] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
METADATA = "metadata.json"
# Without these two Megatron-core's own loader doesn't take the folder (dist_checkpointing/core.py, serialization.py).
_MEGATRON_METADATA = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON_STATE = "common_state/shard_0_1"
_OVERHEAD = 1.02  # each tensor lies in a small archive of its own


@dataclass(frozen=True)
class Import:
    """What was written."""

    checkpoint: Path
    source: Path
    precision: str
    parameters: int
    tensors: int
    bytes: int
    verified: bool
    recipe: str
    run_recipe: Path | None

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@dataclass(frozen=True)
class _Part:
    """A box of a parameter and where its elements come from: a tensor of the folder, or None for padding."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    tensor: HFTensor | None


class _LazyBoxes(torch.Tensor):
    """A parameter as boxes whose elements are read when torch.distributed.checkpoint writes them, and then dropped."""

    parts: list[_Part]
    load: Callable[[_Part], Tensor]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, parts: list[_Part], load: Callable[[_Part], Tensor]
    ) -> "_LazyBoxes":
        self = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype)
        self.parts, self.load = parts, load
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        chunks = self.__create_chunk_list__()
        return [
            WriteItem(
                index=MetadataIndex(fqn, part.start, i),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunks[i], properties=properties, size=self.shape),
            )
            for i, part in enumerate(self.parts)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(part.start), torch.Size(part.size)) for part in self.parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.load(self.parts[index.index or 0])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"a parameter that is yet to be read has no elements to apply {func} to")


@dataclass(frozen=True)
class _Job:
    """An import that has been checked and can start."""

    folder: HFFolder
    plan: ConversionPlan
    recipe: Recipe
    dtype: torch.dtype

    def dtype_of(self, kind: str) -> torch.dtype:
        return torch.float32 if kind == "fp32" else self.dtype

    @property
    def bytes(self) -> int:
        return sum(t.elements * self.dtype_of(t.kind).itemsize for t in self.plan.tensors if t.copy_of is None)

    def load(self, part: _Part, dtype: torch.dtype) -> Tensor:
        if part.tensor is None:
            return torch.zeros(part.size, dtype=dtype)
        return self.folder.read(part.tensor.name).view(part.size).to(dtype)


def from_hf(
    folder: Path,
    out: Path,
    recipe: Recipe | None = None,
    verify: bool = True,
    phases: Phases = silent,
) -> Import:
    """Writes the folder's weights as the new checkpoint `out` of step 0, in the dtype they have.

    recipe: what they are to be trained with; its model must be the folder's (its vocabulary may be padded: new rows are
    zeros). None: a recipe is made from config.json. With a recipe and `out` = RUN/checkpoints/step_00000000 the recipe
    becomes RUN's as well, so that `joy pretrain` goes on from there. Raises UserError before anything is written,
    WorkError when the disk refuses or a tensor on disk is not the folder's.
    """
    refuse_existing(out)
    if step_of(out.name) not in (0, None):
        raise UserError(f"{out}: imported weights are of step 0; name it {out.with_name('step_00000000')}")
    job = _prepare(folder, recipe)
    refuse_full_disk(out, int(job.bytes * _OVERHEAD))
    with new_folder(out) as partial:
        checkpoint = _write(job, partial, phases("writing", job.bytes))
        if verify:
            _verify(job, checkpoint, phases("reading back", job.bytes))
    return Import(
        checkpoint=out,
        source=folder,
        precision=DTYPE_NAMES[job.dtype],
        parameters=len(job.plan.parameters),
        tensors=len(job.plan.tensors),
        bytes=job.bytes,
        verified=verify,
        recipe=job.recipe.name,
        run_recipe=_write_run_recipe(out, recipe) if recipe is not None else None,
    )


def _prepare(path: Path, recipe: Recipe | None) -> _Job:
    config_path = path / CONFIG
    config = read_config(path)
    model = model_of(config, config_path)
    if recipe is not None and (differing := differing_keys(recipe.model, model)):
        raise UserError(f"recipe {recipe.name} is of another model than {config_path}: {', '.join(differing)}")
    plan = conversion_plan(recipe.model if recipe is not None else model, vocabulary=model.vocab_size)
    folder = open_folder(path, config)
    check_tensors(plan, folder.shapes, str(path))
    weights = [tensor.name for tensor in plan.tensors if tensor.kind == "weight" and tensor.name in folder.shapes]
    dtype = only_dtype(folder.dtypes, weights, path)
    if recipe is None:
        recipe = _made_up_recipe(model, dtype, config_path)
    elif DTYPE_NAMES[dtype] == "fp32" and recipe.precision.params_dtype == "bf16":
        raise UserError(
            f"recipe {recipe.name}: precision.params_dtype bf16 would round the fp32 weights of {path}; set it to fp32"
        )
    _check_copies(folder, plan)
    return _Job(folder, plan, recipe, dtype)


def _check_copies(folder: HFFolder, plan: ConversionPlan) -> None:
    """A copy that isn't one would be lost without a word."""
    for tensor in plan.tensors:
        if tensor.copy_of is None or tensor.name not in folder.shapes:
            continue
        if elements_of(folder.read(tensor.name)) != elements_of(folder.read(tensor.copy_of)):
            raise UserError(
                f"{folder.folder / folder.file_of[tensor.name]}: {tensor.name} differs from {tensor.copy_of}, of which "
                "it must be a copy; there is no place for a second head"
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


def _parts(plan: ConversionPlan, key: str) -> Iterator[_Part]:
    for tensor in plan.by_key[key]:
        yield _Part(tensor.start, tensor.size, tensor)
    rows, inner = plan.parameters[key][0], plan.unpadded[key][0]
    if rows > inner:
        rest = plan.parameters[key][1:]
        yield _Part((inner, *(0 for _ in rest)), (rows - inner, *rest), None)


def _tensors(job: _Job, advance: Advance) -> dict[str, Any]:
    """What torch.distributed.checkpoint is given to write."""

    def loader(dtype: torch.dtype) -> Callable[[_Part], Tensor]:
        def load(part: _Part) -> Tensor:
            tensor = job.load(part, dtype)
            advance(tensor.nbytes)
            return tensor

        return load

    tensors: dict[str, Any] = {}
    for key, shape in job.plan.parameters.items():
        dtype = job.dtype_of(job.plan.by_key[key][0].kind)
        tensors[key] = _LazyBoxes(shape, dtype, list(_parts(job.plan, key)), loader(dtype))
    common = io.BytesIO()
    torch.save([{"iteration": 0}], common)
    return tensors | {_COMMON_STATE: common}


def _write(job: _Job, partial: Path, advance: Advance) -> Checkpoint:
    writer = Writer(partial)
    try:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        save(_tensors(job, advance), storage_writer=writer, planner=SavePlanner(), no_dist=True)
    except Exception as error:
        # torch wraps what the disk said.
        raise (writer.fs.error or error) from None
    text = dump_recipe(job.recipe).encode()
    (partial / RECIPE).write_bytes(text)
    (partial / METADATA).write_bytes(orjson.dumps(_MEGATRON_METADATA))
    small = [partial / RECIPE, partial / METADATA]
    entries = [FileEntry(path.name, path.stat().st_size, sha256_of(path)) for path in small]
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
    write_marker(partial, marker)
    return Checkpoint(partial, read_marker(partial))


def _state(job: _Job) -> dict[str, Any]:
    """Where the weights are from, in the place where the training loop keeps how far it is."""
    config = (job.folder.folder / CONFIG).read_bytes()
    return {
        "imported": {
            "folder": job.folder.folder.absolute().name,
            "config_sha256": hashlib.sha256(config).hexdigest(),
            "vocab_size": job.plan.vocabulary,
        }
    }


def _verify(job: _Job, checkpoint: Checkpoint, advance: Advance) -> None:
    """Reads every parameter back from the checkpoint's files and compares its bits."""
    with TensorStore(checkpoint) as store:
        for key in job.plan.parameters:
            for part in _parts(job.plan, key):
                found = store.read(key, part.start, part.size)
                advance(found.nbytes)
                if elements_of(found) != elements_of(job.load(part, found.dtype)):
                    raise WorkError(f"{checkpoint.path}: {key} at {list(part.start)} is not the folder's; not kept")


def _write_run_recipe(out: Path, recipe: Recipe) -> Path | None:
    """RUN/recipe.toml when `out` lies in RUN/checkpoints and RUN has none yet."""
    run = out.absolute().parent.parent
    if out.absolute().parent.name != CHECKPOINTS or (run / RECIPE).exists():
        return None
    write_atomically(run / RECIPE, dump_recipe(recipe).encode())
    return run / RECIPE
