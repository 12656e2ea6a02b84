"""The matrices that a parameter consists of, for Muon; `parallel.kinds` says which parameters Muon has."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from megatron_joy.parallel.kinds import WRAPPER, kind_of
from megatron_joy.parallel.placement import newton_schulz_cost


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
        return self.count * newton_schulz_cost(*self.whole)


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
