"""How many parameters a recipe's model has, by kind: counted on the model itself, built without memory for weights."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_joy.model.backends.select import select_blocks
from megatron_joy.model.build import build_chunks
from megatron_joy.model.config import transformer_config
from megatron_joy.platform.process import alone
from megatron_joy.recipe.schema import LayoutSection, Recipe

# A parameter's kind is that of the first pattern found in its name; a name without one is an error, so that a changed
# Megatron-core can't make the counts quietly incomplete.
KINDS: tuple[tuple[str, str], ...] = (
    (r"^embedding\.", "embedding"),
    (r"^output_layer\.", "head"),
    (r"\.eh_proj\.", "MTP projection"),
    (r"\.self_attention\.", "MLA"),  # with the norms of its two latents
    (r"\.router\.weight$", "router"),
    (r"\.router\.expert_bias$", "router bias"),
    (r"\.mlp\.experts\.", "routed experts"),
    (r"\.mlp\.shared_experts\.", "shared experts"),
    (r"\.mlp\.linear_fc[12]\.", "dense MLP"),
    (r"norm\.weight$", "norms"),
)
COUNTED_BUFFER = "expert_bias"  # the released weights have it as a parameter
TABLES = ("embedding", "head")
ROUTERS = ("router", "router bias")
READINGS: dict[str, tuple[str, ...]] = {
    "with embedding and head": (),
    "with head": ("embedding",),
    "without embedding and head": TABLES,
    "without routers": ROUTERS,
    "without all three": TABLES + ROUTERS,
}


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the main model in `rows`, of the MTP layer in `mtp_rows`: (kind, all, those one token uses).

    The MTP layer is counted without the embedding and the head that it shares with the main model.
    """

    rows: tuple[tuple[str, int, int], ...]
    mtp_rows: tuple[tuple[str, int, int], ...]

    @property
    def total(self) -> int:
        """The main model."""
        return sum(total for _, total, _ in self.rows)

    @property
    def mtp(self) -> int:
        """The MTP layer."""
        return sum(total for _, total, _ in self.mtp_rows)

    @property
    def active(self) -> int:
        """What one token uses of the main model, with the embedding and the head."""
        return self.active_without()

    @property
    def readings(self) -> dict[str, int]:
        """Active parameters of the main model under each reading that is in use.

        arXiv 2604.03044, Table 1 prints 3.28B and 2.7B, which are the two without routers.
        """
        return {name: self.active_without(*kinds) for name, kinds in READINGS.items()}

    def active_without(self, *kinds: str) -> int:
        """What one token uses of the main model, these kinds left out."""
        return sum(active for kind, _, active in self.rows if kind not in kinds)

    def as_json(self) -> dict[str, Any]:
        """For `--json`: kinds as objects, then the sums."""
        kinds, mtp_kinds = (
            [{"kind": kind, "total": total, "active": active} for kind, total, active in rows]
            for rows in (self.rows, self.mtp_rows)
        )
        sums = {"total": self.total, "active": self.active, "mtp": self.mtp, "total_with_mtp": self.total + self.mtp}
        return {"kinds": kinds, "mtp_kinds": mtp_kinds, **sums, "active_readings": self.readings}


class _MetaFactories(TorchFunctionMode):
    """Sends every new tensor to the meta device: Megatron-core's linears name a real device when they allocate."""

    FACTORIES = frozenset(
        getattr(torch, name) for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FACTORIES:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


def meta_model(recipe: Recipe) -> torch.nn.Module:
    """The recipe's whole model in one process, all tensors on the meta device."""
    train = recipe.train.model_copy(update={"recompute": "none"})
    whole = recipe.model_copy(update={"layout": LayoutSection(), "train": train})
    with alone() as process:
        config = transformer_config(whole)
        config.init_model_with_meta_device = True
        with _MetaFactories():
            (model,) = build_chunks(whole, process, config, select_blocks("portable"))
    return model


def _kind(name: str) -> str:
    for pattern, kind in KINDS:
        if re.search(pattern, name):
            return kind
    raise RuntimeError(f"the model has a parameter of no known kind: {name}; give it a row in model.size.KINDS")


def _sizes(model: torch.nn.Module) -> Iterator[tuple[str, int]]:
    for name, parameter in model.named_parameters():
        yield name, parameter.numel()
    for name, buffer in model.named_buffers():
        if name.endswith(COUNTED_BUFFER):
            yield name, buffer.numel()


def parameter_counts(recipe: Recipe) -> ParameterCounts:
    """Counts of the recipe's model, whatever its layout; takes seconds and no memory to speak of for 48B parameters."""
    main: Counter[str] = Counter()
    mtp: Counter[str] = Counter()
    for name, size in _sizes(meta_model(recipe)):
        (mtp if name.startswith("mtp.") else main)[_kind(name)] += size
    chosen, experts = recipe.model.num_experts_per_tok, recipe.model.n_routed_experts
    order = dict.fromkeys(kind for _, kind in KINDS)

    def active(kind: str, total: int) -> int:
        return total * chosen // experts if kind == "routed experts" else total

    return ParameterCounts(
        rows=tuple((kind, main[kind], active(kind, main[kind])) for kind in order if kind in main),
        mtp_rows=tuple((kind, mtp[kind], mtp[kind]) for kind in order if kind in mtp),
    )
