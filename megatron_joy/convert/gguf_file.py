"""A Hugging Face folder as one GGUF file for llama.cpp (architecture deepseek2), by the `gguf` package, and its proof.

Names come from the package's own table, values from its own quantisers. llama.cpp keeps MLA's latent: `kv_b_proj` is
split into each head's key part, transposed, and value part (llama.cpp, conversion of DeepSeek-V2 models). The table has
no place for an MTP layer, so it is left out and said.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from megatron_joy.checkpoint.work_folder import refuse_existing, refuse_full_disk
from megatron_joy.convert.dequantised import open_folder
from megatron_joy.convert.hf_config import CONFIG, model_of, read_config
from megatron_joy.convert.hf_folder import HFFolder
from megatron_joy.convert.mapping import check_tensors, conversion_plan
from megatron_joy.convert.progress import Advance, Phases, silent
from megatron_joy.convert.source import TOKENIZER_CONFIG, TOKENIZER_JSON, TokenizerFolder, check_vocabulary
from megatron_joy.data.atomic import commit_partial, partial_path
from megatron_joy.errors import UserError, WorkError
from megatron_joy.recipe.schema import ModelSection

Array = np.ndarray[Any, Any]
TYPES = {
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
ARCHITECTURE = gguf.MODEL_ARCH.DEEPSEEK2
BLOCK = 32  # numbers of a row that share a scale in Q8_0
# llama.cpp's name of DeepSeek-V3's splits, which it also gives to JoyAI's tokenizer, known by their expressions.
PRE_TOKENIZER = "deepseek-v3"
SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file: shape as torch counts it, and its values as pieces of fp32 along the first dimension."""

    name: str
    shape: tuple[int, ...]
    type: Type
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // block * size


@dataclass(frozen=True)
class GGUFExport:
    """What was written; largest_error: of a number, over the largest magnitude of its row."""

    file: Path
    type: str
    tensors: int
    bytes: int
    largest_error: float | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**vars(self), "file": str(self.file), "notes": list(self.notes)}


def to_gguf(path: Path, out: Path, kind: str = "bf16", verify: bool = True, phases: Phases = silent) -> GGUFExport:
    """Writes the folder as the new file `out`; read back and dequantised by the package where `verify`.

    kind: a key of TYPES, the format of matrices; norms, router and its bias are fp32. Raises UserError before anything
    is written (not a folder of this architecture, no tokenizer or one that llama.cpp has no splits for, a file that is
    there, too little disk), WorkError when the disk refuses or what is read back is not the folder's.
    """
    if kind not in TYPES:
        raise UserError(f"--type {kind}: not one that can be written; expected {', '.join(TYPES)}")
    refuse_existing(out)
    config = read_config(path)
    model = model_of(config, path / CONFIG)
    folder = open_folder(path, config)
    check_tensors(conversion_plan(model), folder.shapes, str(path), folder.file_of)
    vocabulary = _Vocabulary.of(path, model)
    tensors = _tensors(folder, model, TYPES[kind][0])
    size = sum(tensor.bytes for tensor in tensors)
    refuse_full_disk(out, size + (64 << 20))
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(out.absolute())
    try:
        _write(partial, path, model, kind, vocabulary, tensors, phases("writing", size))
        error = _verify(partial, tensors, phases("reading back", size)) if verify else None
        commit_partial(partial, out.absolute())
    except OSError as problem:
        raise WorkError(f"{out}: could not be written: {problem.strerror or problem}; nothing was left there") from None
    finally:
        partial.unlink(missing_ok=True)
    return GGUFExport(out, kind, len(tensors), size, error, tuple(_notes(model, tensors, TYPES[kind][0])))


def _notes(model: ModelSection, tensors: list[GGUFTensor], kind: Type) -> Iterator[str]:
    if model.num_nextn_predict_layers:
        yield "the MTP layer was left out: the gguf package's table of deepseek2 has no place for it"
    if odd := [t.name for t in tensors if t.type == Type.F16 != kind]:
        yield f"{len(odd)} matrices are F16, their rows are not whole blocks of {BLOCK}: {odd[0]} and the like"


def _tensors(folder: HFFolder, model: ModelSection, kind: Type) -> list[GGUFTensor]:
    """Every tensor of the file. The names are those that the package's table gives to Hugging Face's."""
    table = gguf.get_tensor_name_map(ARCHITECTURE, model.num_hidden_layers)
    found = []

    def add(hf: str, shape: tuple[int, ...], pieces: Callable[[], Iterator[Tensor]]) -> None:
        name = table.get_name(hf, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise WorkError(f"the gguf package has no name for {hf} in {gguf.MODEL_ARCH_NAMES[ARCHITECTURE]}")
        plain = len(shape) == 1 or hf.endswith("mlp.gate.weight")
        whole = kind != Type.Q8_0 or shape[-1] % BLOCK == 0
        found.append(GGUFTensor(name, shape, Type.F32 if plain else kind if whole else Type.F16, pieces))

    def one(name: str) -> Callable[[], Iterator[Tensor]]:
        return lambda: iter([folder.read(name).float()])

    last = model.num_hidden_layers
    for name, shape in folder.shapes.items():
        if name.startswith(f"model.layers.{last}."):
            continue
        if (expert := re.fullmatch(r"(.*\.mlp\.experts\.)(\d+)(\..*)", name)) is not None:
            if expert[2] == "0":
                names = [f"{expert[1]}{e}{expert[3]}" for e in range(model.n_routed_experts)]
                add(expert[1].removesuffix(".") + expert[3], (len(names), *shape), _stacked(folder, names))
        elif name.endswith(".kv_b_proj.weight"):
            _add_latent(folder, model, name, add)
        else:
            add(name.replace("_correction_bias", "_correction.bias"), shape, one(name))
    return found


def _stacked(folder: HFFolder, names: list[str]) -> Callable[[], Iterator[Tensor]]:
    return lambda: (folder.read(name).float()[None] for name in names)


def _add_latent(folder: HFFolder, model: ModelSection, name: str, add: Callable[..., None]) -> None:
    """kv_b_proj [heads x (nope + value), latent] as k_b [heads, latent, nope] and v_b [heads, value, latent]."""
    heads, nope, value, latent = (
        model.num_attention_heads,
        model.qk_nope_head_dim,
        model.v_head_dim,
        model.kv_lora_rank,
    )

    def whole() -> Tensor:
        return folder.read(name).float().view(heads, nope + value, latent)

    add(
        name.replace("kv_b_proj", "k_b_proj"),
        (heads, latent, nope),
        lambda: iter([whole()[:, :nope].transpose(1, 2).contiguous()]),
    )
    add(name.replace("kv_b_proj", "v_b_proj"), (heads, value, latent), lambda: iter([whole()[:, nope:].contiguous()]))


@dataclass(frozen=True)
class _Vocabulary:
    """A byte-level BPE tokenizer as llama.cpp wants it."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int | None]
    chat_template: str | None

    @classmethod
    def of(cls, path: Path, model: ModelSection) -> "_Vocabulary":
        """Raises UserError for another kind of tokenizer than DeepSeek-V3's."""
        folder = TokenizerFolder(path)
        tokenizer = folder.load()
        check_vocabulary(folder, tokenizer, model.vocab_size)
        content = json.loads((path / TOKENIZER_JSON).read_text(encoding="utf-8"))
        splits = tuple(
            part["pattern"].get("Regex")
            for part in (content.get("pre_tokenizer") or {}).get("pretokenizers", ())
            if part["type"] == "Split"
        )
        if content["model"].get("type") != "BPE" or splits != SPLITS:
            raise UserError(
                f"{path / TOKENIZER_JSON}: not DeepSeek-V3's kind (byte-level BPE with its three splits), which is the "
                "only one written for llama.cpp; take a tokenizer of that kind"
            )
        tokens = [f"[PAD{i}]" for i in range(model.vocab_size)]
        types = [int(gguf.TokenType.UNUSED)] * model.vocab_size
        for text, i in content["model"]["vocab"].items():
            tokens[i], types[i] = text, int(gguf.TokenType.NORMAL)
        for added in content.get("added_tokens", ()):
            kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
            tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
        config = read_config(path)
        special = {name: config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
        return cls(tokens, types, merges, special, _chat_template(path))


def _chat_template(path: Path) -> str | None:
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    if not (path / TOKENIZER_CONFIG).is_file():
        return None
    found = json.loads((path / TOKENIZER_CONFIG).read_text(encoding="utf-8")).get("chat_template")
    return found if isinstance(found, str) else None


def _write(
    out: Path,
    folder: Path,
    model: ModelSection,
    kind: str,
    vocabulary: _Vocabulary,
    tensors: list[GGUFTensor],
    advance: Advance,
) -> None:
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
    writer.add_name(folder.absolute().name)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _describe(writer, model)
    _add_vocabulary(writer, vocabulary)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, tensor.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            data = np.concatenate([_encoded(piece, tensor).reshape(-1).view(np.uint8) for piece in tensor.pieces()])
            writer.write_tensor_data(data)
            advance(data.nbytes)
    finally:
        writer.close()


def _encoded(piece: Tensor, tensor: GGUFTensor) -> Array:
    """fp32 values as the package encodes them. Raises WorkError for what the format can't hold."""
    largest = float(piece.abs().max())
    if not largest <= torch.finfo(torch.float16 if tensor.type == Type.F16 else torch.bfloat16).max:
        raise WorkError(f"{tensor.name}: has a magnitude of {largest:g}, which {tensor.type.name} cannot hold")
    encoded: Array = gguf.quants.quantize(piece.numpy(), tensor.type)
    return encoded


def _describe(writer: gguf.GGUFWriter, model: ModelSection) -> None:
    """The architecture, with llama.cpp's keys; MLA is told as attention of one group over the latent."""
    writer.add_block_count(model.num_hidden_layers)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_vocab_size(model.vocab_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(model.q_lora_rank)
    writer.add_kv_lora_rank(model.kv_lora_rank)
    writer.add_key_length(model.kv_lora_rank + model.qk_rope_head_dim)
    writer.add_value_length(model.kv_lora_rank)
    writer.add_key_length_mla(model.qk_nope_head_dim + model.qk_rope_head_dim)
    writer.add_value_length_mla(model.v_head_dim)
    writer.add_rope_dimension_count(model.qk_rope_head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_leading_dense_block_count(model.first_k_dense_replace)
    writer.add_expert_count(model.n_routed_experts)
    writer.add_expert_used_count(model.num_experts_per_tok)
    writer.add_expert_shared_count(model.n_shared_experts)
    writer.add_expert_feed_forward_length(model.moe_intermediate_size)
    writer.add_expert_weights_scale(model.routed_scaling_factor)
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: _Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    add = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    for name, token in vocabulary.special.items():
        if token is not None:
            add[name](token)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _verify(path: Path, tensors: list[GGUFTensor], advance: Advance) -> float:
    """Reads every tensor back through the package and dequantises it; returns the largest error relative to its row."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if found.keys() != {tensor.name for tensor in tensors}:
        raise WorkError(f"{path.name}: has other tensors than were written; it is not kept")
    worst = 0.0
    for tensor in tensors:
        read = found[tensor.name]
        values = torch.from_numpy(gguf.quants.dequantize(read.data, read.tensor_type).reshape(tensor.shape).copy())
        first = 0
        for piece in tensor.pieces():
            difference = (values[first : first + len(piece)] - piece).abs().amax(-1)
            allowed = piece.abs().amax(-1) * STEP[tensor.type]
            if not bool((difference <= allowed + 1e-7).all()):
                raise WorkError(f"{tensor.name} is further from the folder's than rounding explains; it is not kept")
            worst = max(worst, float((difference / piece.abs().amax(-1).clamp_min(1e-30)).max()))
            first += len(piece)
        advance(tensor.bytes)
    return worst


# The largest rounding error over a row's largest magnitude: none; half of bf16's and fp16's last bit; half a step of
# Q8_0's 1/127 and the rounding of its fp16 scale, times 127.
STEP = {Type.F32: 0.0, Type.BF16: 2.0**-8, Type.F16: 2.0**-11, Type.Q8_0: 0.5 / 127 + 2.0**-11}
