"""The one table between Megatron's checkpoint keys and Hugging Face's DeepSeek-V3 tensor names; without torch.

The tables below are data; `conversion_plan` spells them out for a model and both directions follow the plan. In a row

* several Hugging Face names mean that Megatron's rows are these tensors' rows, one after the other, in equal parts
  (fc1 is gate, then up);
* `{expert}` in a name means that Megatron's first dimension counts experts and each is a tensor of its own.

Nothing is transposed or permuted: Megatron's MLA rotates neighbouring pairs, as `rope_interleave` of DeepSeek-V3 says.
A sibling model is another `MappingTable`. Sources: transformers' modeling_deepseek_v3.py; for the MTP layer vLLM's
joyai_llm_flash_mtp.py (layer index num_hidden_layers, dense MLP, own copy of the head).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_joy.errors import UserError
from megatron_joy.recipe.schema import ModelSection

Shape = tuple[int, ...]
Kind = Literal["weight", "fp32"]  # fp32: kept so in every precision

DIMENSIONS: dict[str, Callable[[ModelSection], int]] = {
    "vocabulary": lambda m: m.vocab_size,
    "hidden": lambda m: m.hidden_size,
    "2 hidden": lambda m: 2 * m.hidden_size,
    "q latent": lambda m: m.q_lora_rank,
    "heads x (nope + rope)": lambda m: m.num_attention_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim),
    "kv latent": lambda m: m.kv_lora_rank,
    "kv latent + rope": lambda m: m.kv_lora_rank + m.qk_rope_head_dim,
    "heads x (nope + value)": lambda m: m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim),
    "heads x value": lambda m: m.num_attention_heads * m.v_head_dim,
    "dense": lambda m: m.intermediate_size,
    "2 dense": lambda m: 2 * m.intermediate_size,
    "experts": lambda m: m.n_routed_experts,
    "expert": lambda m: m.moe_intermediate_size,
    "2 expert": lambda m: 2 * m.moe_intermediate_size,
    "shared": lambda m: m.n_shared_experts * m.moe_intermediate_size,
    "2 shared": lambda m: 2 * m.n_shared_experts * m.moe_intermediate_size,
}

LAYERS: dict[str, Callable[[ModelSection], range]] = {
    "once": lambda m: range(1),
    "all": lambda m: range(m.num_hidden_layers),
    "dense": lambda m: range(m.first_k_dense_replace),
    "sparse": lambda m: range(m.first_k_dense_replace, m.num_hidden_layers),
    "mtp": lambda m: range(m.num_hidden_layers, m.num_hidden_layers + m.num_nextn_predict_layers),
}


@dataclass(frozen=True)
class Row:
    """One Megatron parameter and its Hugging Face tensors. `shape` is Megatron's, in names of DIMENSIONS."""

    megatron: str
    hf: tuple[str, ...]
    shape: tuple[str, ...]
    kind: Kind = "weight"


@dataclass(frozen=True)
class Block:
    """Rows that occur in certain layers, with both sides' prefixes.

    Prefixes may use {layer}, {attention} and {feed_forward} (HybridModel counts a layer's halves as layers of their
    own) and {mtp}. `file` names the group of files that the tensors go to.
    """

    layers: str
    megatron: str
    hf: str
    rows: tuple[Row, ...]
    file: str = "model"


@dataclass(frozen=True)
class Copy:
    """A Hugging Face tensor that repeats another one for engines that look for it there."""

    layers: str
    hf: str
    of: str
    file: str


@dataclass(frozen=True)
class MappingTable:
    """Everything about the names of one family of models."""

    name: str
    blocks: tuple[Block, ...]
    copies: tuple[Copy, ...] = ()


ATTENTION = (
    Row("input_layernorm.weight", ("input_layernorm.weight",), ("hidden",)),
    Row("self_attention.linear_q_down_proj.weight", ("self_attn.q_a_proj.weight",), ("q latent", "hidden")),
    Row("self_attention.q_layernorm.weight", ("self_attn.q_a_layernorm.weight",), ("q latent",)),
    Row(
        "self_attention.linear_q_up_proj.weight", ("self_attn.q_b_proj.weight",), ("heads x (nope + rope)", "q latent")
    ),
    Row(
        "self_attention.linear_kv_down_proj.weight",
        ("self_attn.kv_a_proj_with_mqa.weight",),
        ("kv latent + rope", "hidden"),
    ),
    Row("self_attention.kv_layernorm.weight", ("self_attn.kv_a_layernorm.weight",), ("kv latent",)),
    Row(
        "self_attention.linear_kv_up_proj.weight",
        ("self_attn.kv_b_proj.weight",),
        ("heads x (nope + value)", "kv latent"),
    ),
    Row("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), ("hidden", "heads x value")),
)
FEED_FORWARD_NORM = Row("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), ("hidden",))
DENSE = (
    FEED_FORWARD_NORM,
    Row("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ("2 dense", "hidden")),
    Row("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), ("hidden", "dense")),
)
SPARSE = (
    FEED_FORWARD_NORM,
    Row("mlp.router.weight", ("mlp.gate.weight",), ("experts", "hidden")),
    Row("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",), ("experts",), "fp32"),
    Row(
        "mlp.experts.experts.linear_fc1.weight",
        ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
        ("experts", "2 expert", "hidden"),
    ),
    Row(
        "mlp.experts.experts.linear_fc2.weight",
        ("mlp.experts.{expert}.down_proj.weight",),
        ("experts", "hidden", "expert"),
    ),
    Row(
        "mlp.shared_experts.linear_fc1.weight",
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
        ("2 shared", "hidden"),
    ),
    Row("mlp.shared_experts.linear_fc2.weight", ("mlp.shared_experts.down_proj.weight",), ("hidden", "shared")),
)
MTP_FRAME = (
    Row("enorm.weight", ("enorm.weight",), ("hidden",)),
    Row("hnorm.weight", ("hnorm.weight",), ("hidden",)),
    # Columns: those of the embedding, then those of the hidden state, on both sides.
    Row("eh_proj.weight", ("eh_proj.weight",), ("hidden", "2 hidden")),
    Row("final_layernorm.weight", ("shared_head.norm.weight",), ("hidden",)),
)
EMBEDDING = (Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("vocabulary", "hidden")),)
HEAD = (
    Row("decoder.final_norm.weight", ("model.norm.weight",), ("hidden",)),
    Row("output_layer.weight", ("lm_head.weight",), ("vocabulary", "hidden")),
)

DECODER = "model.layers.{layer}."
PREDICTOR = "mtp.layers.{mtp}."
JOYAI = MappingTable(
    name="joyai",
    blocks=(
        Block("once", "", "", EMBEDDING),
        Block("all", "decoder.layers.{attention}.", DECODER, ATTENTION),
        Block("dense", "decoder.layers.{feed_forward}.", DECODER, DENSE),
        Block("sparse", "decoder.layers.{feed_forward}.", DECODER, SPARSE),
        Block("once", "", "", HEAD),
        Block("mtp", PREDICTOR, DECODER, MTP_FRAME, file="mtp"),
        Block("mtp", PREDICTOR + "mtp_model_layer.layers.0.", DECODER, ATTENTION, file="mtp"),
        Block("mtp", PREDICTOR + "mtp_model_layer.layers.1.", DECODER, DENSE, file="mtp"),
    ),
    # vLLM registers a head of the MTP layer and expects it in the files; SGLang and xLLM take lm_head and ignore it.
    copies=(Copy("mtp", DECODER + "shared_head.head.weight", "lm_head.weight", file="mtp"),),
)


@dataclass(frozen=True)
class HFTensor:
    """A Hugging Face tensor and the box of a Megatron parameter that has its elements.

    start and size have the parameter's number of dimensions; a leading size of 1 (the expert) is dropped in `shape`.
    """

    name: str
    shape: Shape
    kind: Kind
    file: str
    key: str
    start: Shape
    size: Shape
    copy_of: str | None = None

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ConversionPlan:
    """A mapping table spelled out for one model: every key, every tensor, every shape."""

    model: ModelSection
    vocabulary: int
    parameters: dict[str, Shape]
    unpadded: dict[str, Shape]  # without the vocabulary's padding
    tensors: tuple[HFTensor, ...]

    @cached_property
    def by_name(self) -> dict[str, HFTensor]:
        """The tensors by their Hugging Face name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def by_key(self) -> dict[str, list[HFTensor]]:
        """The tensors that make up each Megatron parameter, copies left out."""
        found: dict[str, list[HFTensor]] = {key: [] for key in self.parameters}
        for tensor in self.tensors:
            if tensor.copy_of is None:
                found[tensor.key].append(tensor)
        return found


def _names(model: ModelSection, index: int) -> dict[str, int]:
    return {
        "layer": index,
        "attention": 2 * index,
        "feed_forward": 2 * index + 1,
        "mtp": index - model.num_hidden_layers,
    }


def _tensors_of(row: Row, key: str, prefix: str, shape: Shape, file: str) -> Iterable[HFTensor]:
    """The Hugging Face tensors of one Megatron parameter of this shape."""
    many = any("{expert}" in name for name in row.hf)
    inner = shape[1:] if many else shape
    rows, rest = inner[0] // len(row.hf), inner[1:]
    for expert in range(shape[0] if many else 1):
        for part, name in enumerate(row.hf):
            start: Shape = (part * rows, *(0 for _ in rest))
            size: Shape = (rows, *rest)
            yield HFTensor(
                name=prefix + name.format(expert=expert),
                shape=size,
                kind=row.kind,
                file=file,
                key=key,
                start=(expert, *start) if many else start,
                size=(1, *size) if many else size,
            )


def _copies(table: MappingTable, model: ModelSection, tensors: Iterable[HFTensor]) -> list[HFTensor]:
    by_name = {tensor.name: tensor for tensor in tensors}
    found = []
    for copy in table.copies:
        for index in LAYERS[copy.layers](model):
            of = by_name[copy.of]
            name = copy.hf.format(**_names(model, index))
            found.append(HFTensor(name, of.shape, of.kind, copy.file, of.key, of.start, of.size, copy_of=of.name))
    return found


def conversion_plan(model: ModelSection, table: MappingTable = JOYAI, vocabulary: int | None = None) -> ConversionPlan:
    """Every Megatron key and every Hugging Face tensor of a model.

    vocabulary: rows of Hugging Face's embedding and head; Megatron's may have more (padding, which Hugging Face never
    sees). None: as many. Raises UserError when it has fewer, ValueError when the table itself is not total.
    """
    vocabulary = model.vocab_size if vocabulary is None else vocabulary
    if not 0 < vocabulary <= model.vocab_size:
        raise UserError(
            f"vocab_size {vocabulary} does not fit model.vocab_size {model.vocab_size}; expected 1 to that many rows"
        )
    unpadded = model.model_copy(update={"vocab_size": vocabulary})
    parameters: dict[str, Shape] = {}
    inner: dict[str, Shape] = {}
    tensors: list[HFTensor] = []
    for block in table.blocks:
        for index in LAYERS[block.layers](model):
            names = _names(model, index)
            megatron, hf = block.megatron.format(**names), block.hf.format(**names)
            for row in block.rows:
                key = megatron + row.megatron
                parameters[key] = tuple(DIMENSIONS[name](model) for name in row.shape)
                inner[key] = tuple(DIMENSIONS[name](unpadded) for name in row.shape)
                tensors += _tensors_of(row, key, hf, inner[key], block.file)
    tensors += _copies(table, model, tensors)
    plan = ConversionPlan(model, vocabulary, parameters, inner, tuple(tensors))
    _check_plan(plan)
    return plan


def _check_plan(plan: ConversionPlan) -> None:
    """Each element of each parameter (padding aside) is in exactly one tensor, and no tensor's name occurs twice."""
    if len(plan.by_name) != len(plan.tensors):
        raise ValueError("the mapping table writes a Hugging Face name twice")
    for key, shape in plan.unpadded.items():
        end = 0
        # A box has whole rows, so its elements follow each other in the flattened parameter.
        for tensor in sorted(plan.by_key[key], key=lambda tensor: tensor.start):
            first = sum(at * math.prod(shape[axis + 1 :]) for axis, at in enumerate(tensor.start))
            if first != end:
                raise ValueError(f"the mapping table has element {min(first, end)} of {key} not once: {tensor.name}")
            end += tensor.elements
        if end != math.prod(shape):
            raise ValueError(f"the mapping table covers {end} of {math.prod(shape)} elements of {key}")


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _check(
    where: str,
    expected: Mapping[str, Shape],
    optional: Iterable[str],
    found: Mapping[str, Shape],
    files: Mapping[str, str],
) -> None:
    def placed(name: str) -> str:
        return f"{name} (in {files[name]})" if name in files else name

    missing = expected.keys() - found.keys() - set(optional)
    extra = found.keys() - expected.keys()
    wrong = [
        f"{placed(name)} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    problems = [f"lacks {_some(missing)}"] * bool(missing)
    problems += [f"has {_some(map(placed, extra))}, which the model has no place for"] * bool(extra)
    problems += [_some(wrong)] * bool(wrong)
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}; take the recipe or config that these weights belong to")


def check_parameters(plan: ConversionPlan, found: Mapping[str, Shape], where: str) -> None:
    """Refuses (UserError, one line with all of it) a checkpoint whose keys and shapes aren't exactly the plan's."""
    _check(where, plan.parameters, (), found, {})


def check_tensors(
    plan: ConversionPlan, found: Mapping[str, Shape], where: str, files: Mapping[str, str] | None = None
) -> None:
    """Refuses a folder whose tensors and shapes aren't exactly the plan's; copies of another tensor may be absent.

    files: which file of the folder each tensor is in, where there are any.
    """
    expected = {tensor.name: tensor.shape for tensor in plan.tensors}
    _check(where, expected, (tensor.name for tensor in plan.tensors if tensor.copy_of), found, files or {})
