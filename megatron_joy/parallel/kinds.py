"""Which optimizer updates a parameter: one table by parameter name, without torch.

Muon orthogonalises maps between hidden states (Moonlight, arXiv 2502.16982, 2.2). Tables of one row a token (embedding,
head), vectors (norms) and the router, whose rows are compared with each other and with the bias of the balance, stay on
AdamW. The router's bias is no parameter: no optimizer has it.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

WRAPPER = "module."  # what DDP puts before names


@dataclass(frozen=True)
class Kind:
    """Parameters whose names match `pattern`. `split` is what tensor parallelism cuts: rows, columns or nothing."""

    pattern: str
    what: str
    optimizer: Literal["muon", "adamw"]
    split: Literal["rows", "columns"] | None = None
    stacked: bool = False  # [experts, rows, columns], each expert a matrix
    gate_up: bool = False  # gate rows, then up rows: two matrices


# The first pattern found in a name decides; a name without one is an error, so that none gets an optimizer by chance.
KINDS: tuple[Kind, ...] = (
    Kind(r"^embedding\.", "embedding", "adamw"),
    Kind(r"^output_layer\.", "head", "adamw"),
    Kind(r"norm\.weight$", "norm", "adamw"),
    # Where Megatron-core's own specification fuses a norm into the linear after it.
    Kind(r"\.layer_norm_weight$", "norm", "adamw"),
    Kind(r"\.router\.weight$", "router", "adamw"),
    Kind(r"\.linear_(q|kv)_down_proj\.weight$", "MLA down projection", "muon"),
    Kind(r"\.linear_(q|kv)_up_proj\.weight$", "MLA up projection", "muon", "rows"),
    Kind(r"\.self_attention\.linear_proj\.weight$", "MLA output projection", "muon", "columns"),
    Kind(r"\.eh_proj\.weight$", "MTP projection", "muon", "rows"),
    Kind(r"\.experts\.linear_fc1$", "experts' gate and up", "muon", "rows", stacked=True, gate_up=True),
    Kind(r"\.experts\.linear_fc2$", "experts' down", "muon", "columns", stacked=True),
    # Transformer Engine has a tensor for each expert: linear_fc1.weight0 and on.
    Kind(r"\.experts\.linear_fc1\.weight\d+$", "an expert's gate and up", "muon", "rows", gate_up=True),
    Kind(r"\.experts\.linear_fc2\.weight\d+$", "an expert's down", "muon", "columns"),
    Kind(r"\.linear_fc1\.weight$", "gate and up", "muon", "rows", gate_up=True),
    Kind(r"\.linear_fc2\.weight$", "down", "muon", "columns"),
)


@cache
def kind_of(name: str) -> Kind:
    """The row of KINDS for a parameter's name; RuntimeError for a name that the table doesn't know."""
    bare = name
    while bare.startswith(WRAPPER):
        bare = bare.removeprefix(WRAPPER)
    for kind in KINDS:
        if re.search(kind.pattern, bare):
            return kind
    raise RuntimeError(f"no optimizer is named for parameter {bare}; give it a row in parallel.kinds.KINDS")
