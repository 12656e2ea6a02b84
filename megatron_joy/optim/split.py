"""Which optimizer updates a parameter, and which matrices it consists of: one table by parameter name.

Muon orthogonalises maps between hidden states (Moonlight, arXiv 2502.16982, 2.2). Tables of one row a token (embedding,
head), vectors (norms) and the router, whose rows are compared with each other and with the bias of the balance, stay on
AdamW. The router's bias is no parameter: no optimizer has it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor

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


def kind_of(name: str) -> Kind:
    """The row of KINDS for a parameter's name; RuntimeError for a name that the table doesn't know."""
    bare = name
    while bare.startswith(WRAPPER):
        bare = bare.removeprefix(WRAPPER)
    for kind in KINDS:
        if re.search(kind.pattern, bare):
            return kind
    raise RuntimeError(f"no optimizer is named for parameter {bare}; give it a row in optim.split.KINDS")


@dataclass(frozen=True)
class Matrices:
    """A local parameter as [count, rows, columns]: what this rank holds of each matrix.

    With `split` the whole matrices are those of all ranks of `group` side by side along that axis.
    """

    count: int
    rows: int
    columns: int
    split: Literal["rows", "columns"] | None
    group: dist.ProcessGroup | None
    splittable: bool  # may be shared out among data-parallel ranks, matrix by matrix

    @property
    def size(self) -> int:
        """Elements of one local matrix."""
        return self.rows * self.columns

    @property
    def whole(self) -> tuple[int, int]:
        """(rows, columns) of a whole matrix."""
        ranks = 1 if self.group is None else self.group.size()
        return self.rows * (ranks if self.split == "rows" else 1), self.columns * (
            ranks if self.split == "columns" else 1
        )

    @property
    def cost(self) -> int:
        """Multiplications of one Newton-Schulz iteration on all matrices: 2m^2n + m^3 each for m x n, m <= n."""
        small, large = sorted(self.whole)
        return self.count * (2 * small * small * large + small**3)


def matrices_of(name: str, param: Tensor, groups: object | None = None) -> Matrices | None:
    """A parameter's matrices, None when AdamW has it. `groups`: this process's; None looks at a whole model."""
    kind = kind_of(name)
    if kind.optimizer == "adamw":
        return None
    if param.dim() != (3 if kind.stacked else 2):
        raise RuntimeError(f"parameter {name} has shape {list(param.shape)}, expected {'3' if kind.stacked else '2'}-D")
    group = None
    if kind.split and groups is not None:
        group = getattr(groups, "expt_tp" if ".mlp.experts." in name else "tp")
        group = group if group.size() > 1 else None
    rows, columns = param.shape[-2] // (2 if kind.gate_up else 1), param.shape[-1]
    return Matrices(
        count=param.numel() // (rows * columns),
        rows=rows,
        columns=columns,
        split=kind.split if group is not None else None,
        group=group,
        splittable=kind.stacked,
    )


def split_text(named: Iterable[tuple[str, Tensor]]) -> str:
    """The split of a model's parameters, a line for each name up to the layer's number: what, optimizer, matrices."""
    lines: dict[tuple[str, ...], int] = {}
    for name, param in named:
        kind, matrices = kind_of(name), matrices_of(name, param)
        shapes = f"{list(param.shape)}"
        if matrices is not None and matrices.count > 1:
            shapes += f" = {matrices.count} x [{matrices.rows}, {matrices.columns}]"
        row = (kind.optimizer, kind.what, re.sub(r"(?<=\.layers\.)\d+", "N", name.removeprefix(WRAPPER)), shapes)
        lines[row] = lines.get(row, 0) + 1
    widths = [max(len(row[i]) for row in lines) for i in range(3)]
    told = (
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), f"{times} x {row[3]}"])
        for row, times in sorted(lines.items(), key=lambda item: item[0][0], reverse=True)
    )
    return "\n".join(told)
