"""Runs the reference and the layout and holds one against the other. Imports no torch: the ranks do."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_joy.errors import UserError, WorkError
from megatron_joy.platform.world import WorldFailed, run_world
from megatron_joy.prove.numbers import Papers, ParameterDifference, Routing, Run, Step, Validation
from megatron_joy.prove.shrink import Shrunk, in_fp32, one_process, shrink
from megatron_joy.recipe.schema import Recipe

MOST_PROCESSES, PROCESSES_PER_CORE = 16, 4
RANK_BYTES = 700 * 2**20  # of a rank of a shrunk model, what it shares with others not counted
STEPS_BEFORE = 2  # in one process before the checkpoint
# By name: the module imports torch, which only the ranks need.
LEAD, FOLLOW = "megatron_joy.prove.runs:lead", "megatron_joy.prove.runs:follow"
UNROUNDED = "megatron_joy.prove.runs:unrounded"
PATIENCE = 600.0  # seconds without a step that mean a hang

# Relative differences from one process that a layout may have in fp32.
TOLERANCES = {"loss": 1e-5, "mtp_loss": 1e-5, "grad_norm": 1e-4, "validation": 1e-5, "parameters": 1e-5}
TIE = 1e-5  # difference of router scores, which are between 0 and 1, that rounding may decide
LOSSES = ("loss", "mtp_loss", "validation")
# In a coarser format than fp32: how far from one process a layout may be, in distances of one process from fp32. A
# layout that is no farther from fp32 than one process is can't be farther from that one than twice the distance.
FORMATS = 2.0

OnStep = Callable[[str, int], None]  # is told the run ("reference" or "layout") and the number of the step just done


def most_processes() -> int:
    """Processes that this machine's memory can hold."""
    return max(1, int(psutil.virtual_memory().available // RANK_BYTES))


def default_processes() -> int:
    """Processes that a proof takes at most when nobody says how many: no more than wait patiently for a core."""
    return min(most_processes(), MOST_PROCESSES, PROCESSES_PER_CORE * (os.cpu_count() or 1))


@dataclass(frozen=True)
class Proof:
    """Both runs step by step, the worst parameter and the routing over all ranks."""

    shrunk: Shrunk
    reference: Sequence[Step]
    layout: Sequence[Step]
    validation: tuple[Validation, Validation]  # in one process, in the layout
    worst: ParameterDifference
    routing: Routing
    seconds: tuple[float, float]  # of the compared steps: in one process, in the layout
    # In a coarser format than fp32: how far one process is from itself in fp32 (by quantity; "ties" of the routing).
    format_cost: Mapping[str, float] | None = None

    @property
    def tolerances(self) -> dict[str, float]:
        """What each difference, and the widest of the routing's ties, may be."""
        cost = self.format_cost
        if cost is None:
            return TOLERANCES | {"ties": TIE}
        # One number may meet fp32's by luck: the losses have the largest of theirs in common.
        losses = max(cost[name] for name in LOSSES if name in cost)
        return {name: FORMATS * (losses if name in LOSSES else cost[name]) for name in (*TOLERANCES, "ties")}

    @property
    def differences(self) -> dict[str, float]:
        """Largest relative difference of each quantity in TOLERANCES over all steps."""
        reference, layout = self.validation
        losses = [name for name in ("loss", "mtp_loss") if getattr(reference, name) is not None]
        found = {
            name: max(map(relative_difference, self._column(self.layout, name), self._column(self.reference, name)))
            for name in (*losses, "grad_norm")
        }
        found["validation"] = max(
            relative_difference(getattr(layout, name), getattr(reference, name)) for name in losses
        )
        return found | {"parameters": self.worst.relative}

    @property
    def equal_loads(self) -> bool:
        """Whether every expert got as many tokens as in the reference, in each layer and step."""
        return all(a.expert_tokens == b.expert_tokens for a, b in zip(self.reference, self.layout, strict=True))

    @property
    def holds(self) -> bool:
        """Whether every difference is within its tolerance and experts get the same tokens."""
        allowed = self.tolerances
        within = all(difference <= allowed[name] for name, difference in self.differences.items())
        return within and self.equal_loads and self.routing.widest <= allowed["ties"]

    @staticmethod
    def _column(steps: Sequence[Step], name: str) -> list[float]:
        return [getattr(step, name) for step in steps]

    def as_json(self) -> dict[str, Any]:
        """Everything but the expert loads, for `--json`."""

        def numbers(steps: Sequence[Step]) -> list[dict[str, Any]]:
            return [{"step": s.number, "loss": s.loss, "mtp_loss": s.mtp_loss, "grad_norm": s.grad_norm} for s in steps]

        return {
            "holds": self.holds,
            "differences": self.differences,
            "tolerances": {name: self.tolerances[name] for name in TOLERANCES},
            "format_cost": self.format_cost,
            "worst_parameter": dataclasses.asdict(self.worst),
            "equal_expert_loads": self.equal_loads,
            "routing": dataclasses.asdict(self.routing) | {"tie": self.tolerances["ties"]},
            "layout": self.shrunk.recipe.layout.model_dump(),
            "processes": self.shrunk.recipe.layout.world_size,
            "changes": [dataclasses.asdict(change) for change in self.shrunk.changes],
            "reference_steps": numbers(self.reference),
            "layout_steps": numbers(self.layout),
            "validation": [dataclasses.asdict(losses) for losses in self.validation],
            "seconds": self.seconds,
        }


def relative_difference(value: float, reference: float) -> float:
    """|value - reference| / |reference|; infinite where either is not a number."""
    difference = abs(value - reference) / abs(reference) if reference else abs(value)
    return difference if difference == difference else float("inf")


def prove(
    recipe: Recipe,
    processes: int | None = None,
    steps: int = 10,
    folder: Path | None = None,
    on_step: OnStep | None = None,
    own_precision: bool = False,
) -> Proof:
    """The recipe's layout, shrunk for at most `processes` processes, follows one process for `steps` steps, or not.

    own_precision: in the recipe's number format instead of fp32, FP8 emulated; what rounding may do is then measured.
    folder: where logs, the checkpoint and the reference's weights stay; None: nowhere. Raises UserError when the
    machine can't hold the world that was asked for, WorkError with the first failing rank's reason.
    """
    room = most_processes()
    if processes is not None and processes > room:
        raise UserError(f"joy prove: {processes} processes don't fit into this machine's memory; give --world {room}")
    small = shrink(recipe, processes or default_processes(), STEPS_BEFORE + steps, own_precision)
    return hold_against_one_process(small, folder, on_step)


def hold_against_one_process(small: Shrunk, folder: Path | None = None, on_step: OnStep | None = None) -> Proof:
    """As `prove`, of a recipe that is small already."""
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="joy-prove-")))
        return hold_against(run_alone(small.recipe, place, on_step), small, on_step)


@dataclass(frozen=True)
class Alone:
    """One process's run, which serves every layout of its recipe, and the same in fp32 where the recipe is coarser.

    `place` holds what the layouts need of it.
    """

    recipe: Recipe
    place: Path
    run: Run
    in_fp32: Run | None

    @property
    def papers(self) -> Papers:
        """What it left in `place`."""
        return _papers(self.place)


def run_alone(small: Recipe, place: Path, on_step: OnStep | None = None) -> Alone:
    """Runs a small recipe in one process; raises as `prove` does."""
    alone, papers = one_process(small), _papers(place)
    (reference,) = _world("reference", place, on_step, LEAD, 1, alone, papers, STEPS_BEFORE)
    plain = in_fp32(alone)
    if plain == alone:
        return Alone(alone, place, reference, None)
    (free,) = _world("in fp32", place, on_step, UNROUNDED, 1, plain, papers, STEPS_BEFORE)
    return Alone(alone, place, reference, free)


def hold_against(alone: Alone, small: Shrunk, on_step: OnStep | None = None) -> Proof:
    """Runs a layout of the recipe that ran alone; raises as `prove` does, and ValueError for another recipe's."""
    if one_process(small.recipe) != alone.recipe:
        raise ValueError("the layout is of another recipe than the one that ran in one process")
    size = small.recipe.layout.world_size
    ranks = _world("layout", alone.place, on_step, FOLLOW, size, small.recipe, alone.papers, STEPS_BEFORE)
    if alone.in_fp32 is None:
        return _proof(small, alone.run, ranks)
    apart = _proof(small, alone.run, [alone.in_fp32])
    return _proof(small, alone.run, ranks, apart.differences | {"ties": apart.routing.widest})


def _papers(place: Path) -> Papers:
    return Papers(place / "checkpoints", place / "weights.safetensors", place / "routing.safetensors")


def _proof(small: Shrunk, reference: Run, ranks: Sequence[Run], cost: Mapping[str, float] | None = None) -> Proof:
    routing, worst = [rank.routing for rank in ranks if rank.routing], [rank.worst for rank in ranks if rank.worst]
    return Proof(
        shrunk=small,
        reference=reference.steps,
        layout=ranks[0].steps,
        validation=(reference.validation, ranks[0].validation),
        worst=max(worst, key=lambda each: each.relative),
        routing=Routing(
            sum(r.decisions for r in routing), sum(r.overruled for r in routing), max(r.widest for r in routing)
        ),
        seconds=(reference.seconds, ranks[0].seconds),
        format_cost=cost,
    )


def _world(name: str, place: Path, on_step: OnStep | None, function: str, size: int, *args: Any) -> list[Any]:
    def told(rank: int, number: int) -> None:
        if on_step is not None:
            on_step(name, number)

    try:
        return run_world(function, size, *args, patience=PATIENCE, log_folder=place / "logs" / name, on_message=told)
    except WorldFailed as failed:
        if failed.users_mistake:
            raise UserError(f"joy prove, {name}: {failed.error.partition(': ')[2]}") from None
        raise WorkError(f"joy prove, {name} of {size}: {failed}") from failed
