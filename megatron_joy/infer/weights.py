"""Weights of either form under Hugging Face's names: a folder of safetensors, or a checkpoint through the mapping."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_joy.convert.dequantised import open_folder
from megatron_joy.convert.hf_config import CONFIG, SpecialTokens, model_of, read_config
from megatron_joy.convert.mapping import check_parameters, check_tensors, conversion_plan
from megatron_joy.convert.source import TOKENIZER_JSON, TokenizerFolder, open_source, tokenizer_of
from megatron_joy.convert.store import TensorStore
from megatron_joy.errors import UserError
from megatron_joy.infer.decoder import Decoder
from megatron_joy.recipe.schema import ModelSection

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Weights:
    """A model and its tensors by Hugging Face name, in their stored dtype; `precision` is that of most of them."""

    model: ModelSection
    read: Callable[[str], Tensor]
    precision: str
    tokenizer: TokenizerFolder | None
    stop: tuple[int, ...]
    where: str
    notes: tuple[str, ...] = ()


@contextmanager
def open_weights(path: Path, tokenizer: Path | None = None) -> Iterator[Weights]:
    """Opens a Hugging Face folder, a checkpoint folder or a run folder (its newest whole checkpoint).

    Raises UserError when it is none of them or its tensors are not its config's or recipe's.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected a run, a checkpoint or a Hugging Face model")
    if (path / CONFIG).is_file():
        yield _hugging_face(path, tokenizer)
        return
    source = open_source(path)
    with TensorStore(source.checkpoint) as store:
        plan = conversion_plan(source.recipe.model)
        check_parameters(plan, store.shapes, str(source.checkpoint.path))

        def read(name: str) -> Tensor:
            tensor = plan.by_name[name]
            return store.read(tensor.key, tensor.start, tensor.size).view(tensor.shape)

        folder = tokenizer_of(source.recipe, tokenizer)
        special = folder.special_tokens(folder.load()) if folder else SpecialTokens()
        yield Weights(
            model=source.recipe.model,
            read=read,
            precision=source.recipe.precision.params_dtype,
            tokenizer=folder,
            stop=() if special.eos is None else (special.eos,),
            where=str(source.checkpoint.path),
            notes=source.notes,
        )


def _hugging_face(path: Path, tokenizer: Path | None) -> Weights:
    config = read_config(path)
    model = model_of(config, path / CONFIG)
    folder = open_folder(path, config)
    check_tensors(conversion_plan(model), folder.shapes, str(path), folder.file_of)
    eos = config.get("eos_token_id")
    place = tokenizer or (path if (path / TOKENIZER_JSON).is_file() else None)
    return Weights(
        model=model,
        read=folder.read,
        precision="bf16" if folder.dtypes["lm_head.weight"] is torch.bfloat16 else "fp32",
        tokenizer=TokenizerFolder(place) if place else None,
        stop=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        where=str(path),
    )


def build_decoder(weights: Weights, precision: str | None = None, device: torch.device | None = None) -> Decoder:
    """The decoder with its weights in memory. precision None: as stored."""
    dtype = DTYPES[precision or weights.precision]
    place = device or torch.device("cpu")

    def read(name: str) -> Tensor:
        tensor = weights.read(name)
        kept = torch.float32 if name.endswith("e_score_correction_bias") else dtype
        return tensor.to(device=place, dtype=kept)

    with torch.inference_mode():
        return Decoder(weights.model, read)
