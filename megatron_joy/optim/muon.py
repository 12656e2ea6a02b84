"""Muon on this rank's share of the matrices: momentum, Newton-Schulz on whole matrices, a scaled update."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_joy.optim.newton_schulz import Triple, orthogonalize
from megatron_joy.optim.split import Matrices

BUFFER = "momentum_buffer"


@dataclass(frozen=True)
class MuonSettings:
    """What the recipe says about Muon, learning rate and weight decay apart."""

    momentum: float
    nesterov: bool
    polynomials: tuple[Triple, ...]
    update_rms: float
    dtype: torch.dtype


class Muon(torch.optim.Optimizer):
    """B <- mu B + G; W <- (1 - lr wd) W - lr rms sqrt(max(rows, columns)) NewtonSchulz(G + mu B).

    Moonlight (arXiv 2502.16982; docs/optimizer.md). Parameters are flat fp32 shards as Megatron-core's distributed
    optimizer makes them; `matrices` says of each which whole local matrices it is, and must be filled before the first
    step. State is the momentum, fp32 and as sharded as the parameter. Ranks that hold parts of the same matrices
    (tensor parallelism) step together.
    """

    def __init__(self, params: Iterable[Any], settings: MuonSettings, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.settings = settings
        self.matrices: dict[Tensor, Matrices] = {}

    def init_state(self) -> None:
        """Momentum of zeros where there is none."""
        for group in self.param_groups:
            for param in group["params"]:
                if BUFFER not in self.state[param]:
                    self.state[param][BUFFER] = torch.zeros_like(param)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter; a group without parameters counts its steps too."""
        self.init_state()
        mu = self.settings.momentum
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                buffer = self.state[param][BUFFER]
                buffer.mul_(mu).add_(param.grad)
                direction = param.grad.add(buffer, alpha=mu) if self.settings.nesterov else buffer
                update = self.update(direction, self.matrices[param])
                # Decay is by the learning rate alone, not by the matrix's scale (Moonlight's code).
                param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def update(self, direction: Tensor, matrices: Matrices) -> Tensor:
        """The update before the learning rate of some whole local matrices, flat as `direction` is."""
        parts = direction.view(-1, matrices.rows, matrices.columns)
        orthogonal = orthogonalize(_whole(parts, matrices), self.settings.polynomials, self.settings.dtype)
        # An orthogonal m x n matrix has RMS 1/sqrt(max(m, n)).
        scale = self.settings.update_rms * math.sqrt(max(matrices.whole))
        return _part(orthogonal, matrices).reshape(-1).mul(scale)


AXES = {"rows": 1, "columns": 2}


def _whole(parts: Tensor, matrices: Matrices) -> Tensor:
    """[k, rows, columns] of this rank -> [k, whole rows, whole columns], gathered over the group."""
    if matrices.group is None or matrices.split is None:
        return parts
    gathered = [torch.empty_like(parts) for _ in range(matrices.group.size())]
    dist.all_gather(gathered, parts.contiguous(), group=matrices.group)
    return torch.cat(gathered, dim=AXES[matrices.split])


def _part(whole: Tensor, matrices: Matrices) -> Tensor:
    """This rank's part, the way back of `_whole`."""
    if matrices.group is None or matrices.split is None:
        return whole
    return whole.chunk(matrices.group.size(), dim=AXES[matrices.split])[matrices.group.rank()]
