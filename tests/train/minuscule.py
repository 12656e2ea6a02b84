"""Minuscule real runs: text of letters as shards, a recipe of 60,000 weights, forked ranks that call `joy pretrain`."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_joy.recipe import Recipe, dump_recipe
from tests.data.tiny_shards import recipe_table, some_texts, write_shard_set
from tests.gloo import WorldFailed, run_world

SEQUENCE, BATCH, STEPS, EXPERTS, MOE_LAYERS = 32, 8, 8, 4, 2
SAMPLES = BATCH * STEPS
LOSSES = ("loss", "mtp_loss", "grad_norm")

ONE: tuple[str, ...] = ()
EP2 = ("layout.data_parallel_size=2", "layout.expert_model_parallel_size=2")
ONE_MUON = ("optimizer.name=muon",)
EP2_MUON = (*EP2, *ONE_MUON)
PP2 = ("layout.pipeline_model_parallel_size=2", "layout.pipeline_layer_counts=[2, 1]")
PROCESSES = {ONE: 1, ONE_MUON: 1, EP2: 2, EP2_MUON: 2, PP2: 2}

Row = dict[str, Any]


def recipe_tables(folder: Path) -> dict[str, Any]:
    """Three layers (one dense), four experts, the MTP layer; one process, fp32, a checkpoint after every third step."""
    sources = [{"manifest": str(folder / "letters"), "weight": 3.0}, {"manifest": str(folder / "digits")}]
    tables = recipe_table(sources, SEQUENCE, steps=STEPS, global_batch_size=BATCH, micro_batch_size=4, threads=1)
    tables["model"] |= {
        "vocab_size": 264,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": EXPERTS,
        "backend": "portable",
    }
    return tables | {
        "name": "minuscule",
        "precision": {"params_dtype": "fp32"},
        "schedule": {"peak_lr": 1e-2, "final_lr": 1e-3, "warmup_steps": 2, "decay_steps": 3},
        "checkpoint": {"interval": 3},
        "run": {"folder": str(folder / "run"), "tensorboard": False},
    }


def make_home(folder: Path) -> Path:
    """Data (two sources to train on, one to validate on) and the recipe, `minuscule.toml`, in a folder."""
    for number, name in enumerate(("letters", "digits", "held_out")):
        write_shard_set(folder / name, some_texts(2, 60, seed=number, longest=60), name)
    (folder / "minuscule.toml").write_text(dump_recipe(Recipe.model_validate(recipe_tables(folder))))
    return folder


def validation(home: Path, interval: int, samples: int = 16) -> tuple[str, ...]:
    """Overrides that validate on the third source."""
    manifest = json.dumps([{"manifest": str(home / "held_out")}]).replace('":', '" =').replace('"manifest"', "manifest")
    return (
        f"data.validation={manifest}",
        f"train.validation_interval={interval}",
        f"train.validation_samples={samples}",
    )


def joy(arguments: Sequence[str], before: Callable[..., None] | None = None, inputs: Sequence[Any] = ()) -> int:
    """`joy` in a forked rank, after `before(*inputs)`; its exit code."""
    from megatron_joy.cli.main import main

    if before is not None:
        before(*inputs)
    try:
        return main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code of each rank and what each printed (log of the test's, not the run's)."""

    codes: list[int]
    printed: list[str]
    run: Path

    @property
    def rows(self) -> list[Row]:
        """metrics.jsonl, in the order written."""
        return read_lines(self.run / "metrics.jsonl")

    @property
    def events(self) -> list[Row]:
        """events.jsonl, in the order written."""
        return read_lines(self.run / "events.jsonl")

    @property
    def checkpoints(self) -> list[str]:
        """Everything in the folder of checkpoints."""
        return sorted(path.name for path in (self.run / "checkpoints").iterdir())

    def told(self, kind: str) -> list[str]:
        """Messages of the events of a kind."""
        return [event["message"] for event in self.events if event["kind"] == kind]


def read_lines(path: Path) -> list[Row]:
    """The objects of a .jsonl file; none where there is no file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def train(
    home: Path,
    run: Path,
    layout: tuple[str, ...] = ONE,
    *overrides: str,
    before: Callable[..., None] | None = None,
    inputs: Sequence[Any] = (),
    patience: float = 120.0,
) -> Outcome:
    """`joy pretrain` on all ranks of a layout, to its end. Raises WorldFailed when a rank is killed."""
    arguments = ["pretrain", str(home / "minuscule.toml"), f"run.folder={run}", *layout, *overrides]
    logs = run.parent / f"{run.name}.printed"
    for old in logs.glob("*"):
        old.unlink()
    size = PROCESSES[layout]
    codes = run_world(joy, size, arguments, before, inputs, log_folder=logs, timeout=patience)
    return Outcome(codes, [(logs / f"rank_{rank}.log").read_text() for rank in range(size)], run)


def train_until_killed(
    home: Path, run: Path, layout: tuple[str, ...], before: Callable[..., None], *inputs: Any
) -> None:
    """`train` in which `before` arranges for a SIGKILL."""
    with pytest.raises(WorldFailed) as killed:
        train(home, run, layout, before=before, inputs=inputs)
    assert killed.value.exit_code == -signal.SIGKILL


def last_rows(rows: Sequence[Row]) -> list[Row]:
    """One row a step: that of the largest attempt."""
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def numbers(rows: Sequence[Row]) -> list[tuple[float, ...]]:
    """Step, losses and gradient norm of rows."""
    return [(row["step"], *(row[key] for key in LOSSES)) for row in rows]


def die(*args: Any, **kwargs: Any) -> None:
    """SIGKILL, here and now."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: int, action: Callable[[], Any], rank: int | None = None) -> None:
    """Arranges for `action` just before update `step` is computed, on one rank or on all."""
    from megatron_joy.train.step import Trainer

    if rank not in (None, int(os.environ["RANK"])):
        return
    compute = Trainer.step

    def then(trainer: Any, number: int, batches: Any) -> Any:
        if number == step:
            action()
        return compute(trainer, number, batches)

    Trainer.step = then  # type: ignore[method-assign]


def kill_near(nth: int, share: float) -> None:
    """Arranges for SIGKILL after this attempt's nth update began: at once for share 0, about a step later for 1."""
    from megatron_joy.train.step import Trainer

    compute = Trainer.step
    began: list[float] = []

    def then(trainer: Any, number: int, batches: Any) -> Any:
        began.append(time.perf_counter())
        if len(began) == nth:
            threading.Timer(share * (began[-1] - began[-2] if nth > 1 else 0.02), die).start()
        return compute(trainer, number, batches)

    Trainer.step = then  # type: ignore[method-assign]


def signal_at(step: int, number: int, rank: int | None = None) -> None:
    """Arranges for a signal in the midst of an update, on one rank or on all."""
    at_step(step, lambda: os.kill(os.getpid(), number), rank)


STAGES = """
[[stages]]
name = "warmup"
steps = 4
ramp_from = 4
ramp_increment = 4
start_lr = 0.0
end_lr = 1e-2
lr_shape = "linear"
mtp_loss_factor = 0.0
blend = [{ source = "letters", weight = 3.0 }, { source = "digits" }]

[[stages]]
name = "decay"
steps = 3
end_lr = 5e-3
lr_shape = "cosine"
blend = [{ source = "letters" }, { source = "digits", weight = 3.0 }]

[[stages]]
name = "long"
steps = 3
sequence_length = 64
global_batch_size = 4
micro_batch_size = 2
end_lr = 1e-3
lr_shape = "linear"
rope_theta = 40_000.0
router_bias_update_rate = 0.0
min_longest_document = 50
blend = [{ source = "digits" }, { source = "letters" }]
"""
STAGED_STEPS = 10


def make_staged_home(folder: Path) -> Path:
    """As `make_home`, through three stages in ten steps: ramp, blend, MTP, length and rotary base change."""
    make_home(folder)
    plain = folder / "minuscule.toml"
    plain.rename(folder / "plain.toml")
    names = "".join(f'[[data.train]]\nname = "{n}"\nmanifest = "{folder / n}"\n' for n in ("letters", "digits"))
    plain.write_text(
        f'extends = "plain.toml"\n[train]\nsteps = {STAGED_STEPS}\nmicro_batch_size = 2\n'
        f"[checkpoint]\ninterval = 1\nkeep_last = 20\n{names}{STAGES}"
    )
    return folder
