"""The precisions that can be written: what each stores, which weights stay as they are and why."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_joy.convert.mapping import ConversionPlan, HFTensor
from megatron_joy.convert.precisions.schemes import Scheme, fp8_blocks, int4_groups, int8_tiles
from megatron_joy.errors import UserError


@dataclass(frozen=True)
class LeftOut:
    """Weights whose name matches stay in the rest's format, for a reason that is written beside the model."""

    pattern: str
    why: str


@dataclass(frozen=True)
class Precision:
    """A row of the table. `rest`: the format of all that is not quantised. scheme None: nothing is.

    whole_tiles: a matrix whose sides are not whole tiles is left out. method: `quant_method` of config.json; `options`
    goes with it (see `config.py`).
    """

    name: str
    rest: str
    what: str
    scheme: Scheme | None = None
    left_out: tuple[LeftOut, ...] = ()
    whole_tiles: bool = False
    method: str = ""


ALWAYS = (
    LeftOut(r"e_score_correction_bias$", "the router's bias is fp32 in every precision"),
    LeftOut(r"\.mlp\.gate\.weight$", "the router decides between near scores"),
    LeftOut(r"norm\.weight$", "a norm is a vector"),
    LeftOut(r"embed_tokens\.weight$", "the embedding is looked up, not multiplied"),
    LeftOut(r"(^|\.)(lm_head|shared_head\.head)\.weight$", "the head decides between near logits"),
    LeftOut(r"\.eh_proj\.weight$", "engines build the MTP layer's projection as a plain linear layer"),
)
ABSORBED = LeftOut(r"\.kv_b_proj\.weight$", "engines absorb it into their attention and want its elements")
PARTIAL = "its sides are not whole tiles, which transformers cannot read"
# Engines join these into one matrix, so either all of them are quantised or none; the last is the joined one's name.
JOINED = (("q_a_proj", "kv_a_proj_with_mqa"), ("fused_qkv_a_proj_with_mqa", "fused_qkv_a_proj"))

PRECISIONS: dict[str, Precision] = {
    row.name: row
    for row in (
        Precision("bf16", "bf16", "bf16 weights, router biases fp32"),
        Precision("fp32", "fp32", "fp32 weights"),
        Precision(
            "fp8",
            "bf16",
            "E4M3 weights in blocks of 128 x 128, activations quantised as they come (DeepSeek-V3's form)",
            fp8_blocks(),
            ALWAYS,
            whole_tiles=True,
            method="fp8",
        ),
        Precision(
            "int8",
            "bf16",
            "int8 weights in blocks of 128 x 128, activations quantised as they come (SGLang's blockwise_int8)",
            int8_tiles("int8-block", (128, 128), "weight_scale_inv"),
            ALWAYS,
            method="blockwise_int8",
        ),
        Precision(
            "int8-channel",
            "bf16",
            "int8 weights with a scale per output, activations quantised per token (compressed-tensors)",
            int8_tiles("int8-channel", (1, 0), "weight_scale"),
            ALWAYS,
            method="compressed-tensors",
        ),
        Precision(
            "int4",
            "bf16",
            "int4 weights in groups of 32 inputs, activations as they are (compressed-tensors)",
            int4_groups(32),
            (*ALWAYS, ABSORBED),
            whole_tiles=True,
            method="compressed-tensors",
        ),
        Precision(
            "int4-fp8",
            "bf16",
            "int4 weights in groups of 128 inputs, activations in FP8 per token (compressed-tensors, W4A8)",
            int4_groups(128),
            (*ALWAYS, ABSORBED),
            whole_tiles=True,
            method="compressed-tensors",
        ),
    )
}


def precision_of(name: str) -> Precision:
    """The row of a name. Raises UserError with those there are."""
    if name not in PRECISIONS:
        raise UserError(f"--precision {name}: not one that can be written; expected {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def _own_reason(tensor: HFTensor, precision: Precision, scheme: Scheme) -> str | None:
    for row in precision.left_out:
        if re.search(row.pattern, tensor.name):
            return row.why
    if len(tensor.shape) != 2:
        return "it is no matrix"
    if precision.whole_tiles and not _whole(tensor.shape, scheme):
        return PARTIAL
    return None


def _whole(shape: tuple[int, ...], scheme: Scheme) -> bool:
    """Whether both sides are whole tiles. For blocks one tile that is cut short does, for groups it does not."""
    sides = zip(shape, scheme.tile, strict=True)
    blocks = scheme.tile[0] > 1
    return all(not tile or side % tile == 0 or (blocks and side < tile) for side, tile in sides)


def left_out(plan: ConversionPlan, precision: Precision) -> dict[str, str]:
    """Hugging Face name -> why it is not quantised, for each tensor of the plan that is not."""
    scheme = precision.scheme
    if scheme is None:
        return {tensor.name: f"the precision is {precision.name}" for tensor in plan.tensors}
    found = {t.name: why for t in plan.tensors if (why := _own_reason(t, precision, scheme)) is not None}
    for name, why in _partners(plan.by_name, found):
        found.setdefault(name, why)
    return found


def _partners(names: Iterable[str], found: dict[str, str]) -> list[tuple[str, str]]:
    """Weights that engines join with one that is left out."""
    members, _ = JOINED
    partners = []
    for name in names:
        if name in found and any(f".{member}." in name for member in members):
            stem = name.rpartition(".self_attn.")[0] + ".self_attn."
            partners += [(f"{stem}{m}.weight", "engines join it with one that is left out") for m in members]
    return partners
