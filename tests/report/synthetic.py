"""Run folders made up for tests: any length, with kills, resumes, repeated steps, torn lines and losses gone bad.

The generator writes what a run would, in the order it would, and returns the rows that should count: that is the
truth the report's numbers are held against.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

START_TIME = 1_770_000_000.0
RECIPE = """name = "{name}"
description = "{description}"
seed = 7

# The architecture.
[model]
vocab_size = 8192
hidden_size = 128
num_hidden_layers = {model_layers}
first_k_dense_replace = 1
num_attention_heads = 4
q_lora_rank = 64
kv_lora_rank = 32
qk_nope_head_dim = 32
qk_rope_head_dim = 16
v_head_dim = 32
intermediate_size = 384
moe_intermediate_size = 96
n_routed_experts = {experts}
num_experts_per_tok = 2

[layout]
pipeline_model_parallel_size = 2
expert_model_parallel_size = 2

[data]
sequence_length = 256

[[data.train]]
manifest = "data/train"

[[data.validation]]
manifest = "{validation}"

[optimizer]
clip_grad = 1.0

[train]
steps = {planned}
global_batch_size = 16
"""


@dataclass(frozen=True)
class Plan:
    """What happens in the run.

    `kills` has (step it died at, step the next attempt resumed from); `stops` end an attempt by SIGTERM instead.
    `last_word` is the kind of the last event, "none" for an attempt that just ends. `torn_kills` leaves half a line at
    each kill, then a newline, as a writer that does not repair would.
    """

    steps: int = 300
    planned: int = 300
    layers: int = 3
    experts: int = 8
    kills: tuple[tuple[int, int], ...] = ()
    stops: tuple[int, ...] = ()
    last_word: str = "finish"
    nan_steps: tuple[int, ...] = ()
    dead: tuple[tuple[int, int], ...] = ()
    hot: tuple[tuple[int, int], ...] = ()
    torn_kills: bool = False
    torn_tail: bytes = b""
    validation_interval: int = 50
    checkpoint_interval: int = 50
    keep: int = 3
    sources: dict[str, float] = field(default_factory=lambda: {"standard library": 0.7, "package docs": 0.3})
    step_seconds: float = 0.4
    tokens_per_step: int = 4096
    name: str = "synthetic"
    description: str = "A run that never was."
    validation: str = "data/validation"
    with_load: bool = True
    seed: int = 0
    end_time: float | None = None


@dataclass
class Truth:
    """The rows that count, by step, and the number of lines that don't."""

    rows: dict[int, dict[str, Any]]
    superseded: int


def attempts_of(plan: Plan) -> list[tuple[int, int, str]]:
    """(start step, end step, how it ended) of each attempt."""
    ends = sorted([(*kill, "kill") for kill in plan.kills] + [(step, step, "stop") for step in plan.stops])
    spans, start = [], 0
    for died, resumed, how in ends:
        spans.append((start, died, how))
        start = resumed
    return [*spans, (start, plan.steps, plan.last_word)]


class Generator:
    """Rows of a run that behaves as such runs do."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.random = np.random.default_rng(plan.seed)
        self.skew = self.random.normal(0, 0.9, (plan.layers, plan.experts))
        self.time = START_TIME

    def load(self, step: int) -> np.ndarray:
        """[layers, experts] shares: skewed at first, evened out by the balancing, but for the dead and the hot."""
        plan = self.plan
        fade = 0.12 + np.exp(-step / (0.06 * plan.steps + 10))
        wander = 0.25 * np.sin(step / (0.05 * plan.steps + 3) + self.skew * 9)
        noise = self.random.normal(0, 0.08, self.skew.shape)
        ratio = np.exp(self.skew * fade + wander * 0.4 + noise)
        for layer, expert in plan.dead:
            ratio[layer, expert] *= np.exp(-step / (0.03 * plan.steps))
        for layer, expert in plan.hot:
            ratio[layer, expert] = 1 + 2.2 * step / plan.steps
        return np.round(ratio / ratio.sum(axis=1, keepdims=True), 6)

    def row(self, step: int, attempt: int) -> dict[str, Any]:
        """One row as the training loop would write it."""
        plan, random = self.plan, self.random
        saving = plan.checkpoint_interval and step % plan.checkpoint_interval == 0
        seconds = plan.step_seconds * random.lognormal(0, 0.04) * (3 if saving else 1)
        self.time += seconds
        share = step / plan.steps
        floor = 3.1 + 5.9 * np.exp(-9 * share**0.7) - 0.35 * share
        loss = float(floor + random.normal(0, 0.05))
        warm = min(1.0, step / (0.07 * plan.steps + 1))
        row: dict[str, Any] = {
            "step": step,
            "attempt": attempt,
            "time": self.time,
            "loss": float("nan") if step in plan.nan_steps else loss,
            "mtp_loss": float(floor + 0.55 + random.normal(0, 0.06)),
            "lr": float(3e-3 * warm * (1 if share < 0.7 else 0.1 + 0.45 * (1 + np.cos(np.pi * (share - 0.7) / 0.3)))),
            "grad_norm": float(0.6 + 4 * np.exp(-14 * share) + random.lognormal(-2, 0.9)),
            "tokens": step * plan.tokens_per_step,
            "samples": step * 16,
            "step_seconds": seconds,
            "tokens_per_second": plan.tokens_per_step / seconds,
            "loss_tokens": plan.tokens_per_step - 20,
            "balance_loss": 1e-4,
            "worst_violation": 0.5,
            "tokens_per_second_per_device": plan.tokens_per_step / seconds / 4,
            "model_flops_per_token": 1.5e6,
            "mfu": plan.tokens_per_step / seconds / 4 * 1.5e6 / 2e10,
            "data_seconds": 0.01 * seconds,
            "forward_seconds": 0.3 * seconds,
            "backward_seconds": 0.5 * seconds,
            "communication_seconds": 0.1 * seconds,
            "optimizer_seconds": 0.05 * seconds,
            "validation_seconds": 0.0,
            "checkpoint_seconds": 0.4 if saving else 0.0,
            "parameters_bytes": 2_000_000,
            "gradients_bytes": 4_000_000,
            "optimizer_bytes": 8_000_000,
            "peak_bytes": 900_000_000 + 1000 * step,
        }
        if plan.with_load:
            row["expert_load"] = self.load(step).tolist()
        names, weights = list(plan.sources), np.array(list(plan.sources.values()))
        row["sources"] = dict(zip(names, random.multinomial(16, weights / weights.sum()).tolist(), strict=True))
        if plan.validation_interval and step % plan.validation_interval == 0:
            row |= {"validation_loss": float(floor + 0.06), "validation_mtp_loss": float(floor + 0.63)}
            row |= {f"mtp_acceptance_{n}": share**n for n in (1, 2, 3)}
            row |= {"mtp_acceptance_length": 1 + share + share**2 + share**3}
            row |= {"mtp_acceptance_ratio": (share + share**2 + share**3) / 3}
        return row

    def event(self, kind: str, step: int, attempt: int, message: str, **extra: Any) -> dict[str, Any]:
        """One event."""
        return {"time": self.time, "step": step, "attempt": attempt, "kind": kind, "message": message} | extra


def _dump(row: dict[str, Any]) -> bytes:
    bad = [k for k, v in row.items() if isinstance(v, float) and v != v]
    return orjson.dumps(row | ({"nonfinite": dict.fromkeys(bad, "nan")} if bad else {})) + b"\n"


def write_run(folder: Path, plan: Plan) -> Truth:
    """Writes the run's folder and returns the truth about it."""
    folder.mkdir(parents=True, exist_ok=True)
    maker, truth, events = Generator(plan), Truth({}, 0), []
    with (folder / "metrics.jsonl").open("wb") as metrics:
        for number, (start, end, how) in enumerate(attempts_of(plan)):
            for step in [step for step in truth.rows if step > start]:
                del truth.rows[step]
                truth.superseded += 1
            layout = {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
            kind = "resume" if number else "start"
            events.append(maker.event(kind, start, number, f"{kind} at step {start}", world_size=4, layout=layout))
            events += _attempt(maker, metrics, truth, number, (start, end))
            if how == "kill":
                metrics.write(b'{"step": 99999, "att\n' if plan.torn_kills else b"")
                maker.time += 35.0
            elif how != "none":
                events.append(maker.event(how, end, number, {"stop": "SIGTERM: left after a checkpoint"}.get(how, how)))
        metrics.write(plan.torn_tail)
    (folder / "events.jsonl").write_bytes(b"".join(map(_dump, events)))
    _write_rest(folder, plan)
    return truth


def _attempt(
    maker: Generator, metrics: Any, truth: Truth, number: int, span: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    plan = maker.plan
    for step in range(span[0] + 1, span[1] + 1):
        row = maker.row(step, number)
        metrics.write(_dump(row))
        truth.rows[step] = row
        if plan.checkpoint_interval and step % plan.checkpoint_interval == 0:
            yield maker.event("checkpoint", step, number, f"checkpoint of step {step}")


def _write_rest(folder: Path, plan: Plan) -> None:
    recipe = RECIPE.format(
        name=plan.name,
        description=plan.description,
        model_layers=plan.layers + 1,
        experts=plan.experts,
        planned=plan.planned,
        validation=plan.validation,
    )
    (folder / "recipe.toml").write_text(recipe)
    environment = {
        "python": "3.12.9",
        "versions": {"torch": "2.15.0", "megatron-core": "0.19.2", "megatron_joy": "0.1.0"},
        "host": {"platform": "Linux x86_64", "processors": 2, "memory_bytes": 16_000_000_000},
        "device": "cpu",
        "command": ["joy", "launch", "local", "joyai_tiny"],
    }
    (folder / "environment.json").write_bytes(orjson.dumps(environment))
    every = plan.checkpoint_interval
    steps = range(every, plan.steps + 1, every) if every else range(0)
    for step in list(steps)[-plan.keep :]:
        place = folder / "checkpoints" / f"step_{step:08d}"
        place.mkdir(parents=True)
        (place / "weights.distcp").write_bytes(b"w" * 1000)
        (place / "COMMITTED.json").write_text("{}")
