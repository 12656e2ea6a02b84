"""The data that a report's page carries: everything the charts draw, as plain JSON values, bounded in size.

Up to ROWS rows are carried as they are, so that the page's numbers are the run's. A longer run is cut into ROWS
buckets of equal numbers of rows, each with mean, lowest and highest.
"""

from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_joy.report import heat
from megatron_joy.report.histories import SourceHistory
from megatron_joy.report.runlog import RunLog
from megatron_joy.report.summary import RunSummary, first_moe_layer

ROWS = 4000
EVENTS = 2000
MAX_SOURCES = 7
STEP_PHASES = ("data", "forward", "backward", "communication", "optimizer")
SCALARS = (
    "loss",
    "mtp_loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    *(f"{phase}_seconds" for phase in STEP_PHASES),
)
VALIDATION = ("validation_loss", "validation_mtp_loss", *(f"mtp_acceptance_{drafts}" for drafts in (1, 2, 3)))
Numbers = NDArray[np.float64]


def plain(values: Any, digits: int | None = None) -> list[Any]:
    """A JSON list of an array of any shape; NaN and infinities become null. `digits` rounds to significant digits."""
    numbers = np.asarray(values, np.float64)
    if digits is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            unit = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(numbers))))
            numbers = np.where(np.isfinite(unit), np.rint(numbers * unit) / unit, numbers)
    # orjson writes the shortest text that reads back as the same number, and null for what is none.
    return orjson.loads(orjson.dumps(numbers.tolist()))


def safe_json(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element or open a comment."""
    encoded = orjson.dumps(value).decode()
    for mark in "<>&\u2028\u2029":
        encoded = encoded.replace(mark, f"\\u{ord(mark):04x}")
    return encoded


def build_payload(run: RunLog, summary: RunSummary) -> dict[str, Any]:
    """All that the page's script needs; times are seconds since the run's first start."""
    metrics, origin = run.metrics, summary.started or 0.0
    starts = bucket_starts(len(metrics), ROWS)
    validated = np.flatnonzero(np.isfinite(metrics["validation_loss"]))
    validated = validated[:: max(1, -(-len(validated) // ROWS))]
    axes = {"rows": _axis(run, bucket_last(starts, len(metrics)), origin), "validation": _axis(run, validated, origin)}
    series = {name: {"axis": "rows"} | bucketed(metrics[name], starts) for name in SCALARS}
    series |= {name: {"axis": "validation", "mean": plain(metrics[name][validated])} for name in VALIDATION}
    load = _load(run, axes, series, origin)
    return {
        "summary": summary.as_json(),
        "rows": len(metrics),
        "rows_per_point": max(1, round(len(metrics) / max(1, len(starts)))),
        "axes": axes,
        "series": {name: one for name, one in series.items() if any(v is not None for v in one["mean"])},
        "load": load,
        "sources": _sources(metrics.sources),
        "attempts": [_attempt(run, number, origin) for number in range(len(run.attempts))],
        "checkpoints": checkpoints(run, origin),
        "events": events(run, origin),
        "nonfinite": metrics.nonfinite.get("loss", [])[:EVENTS],
    }


def bucket_starts(rows: int, buckets: int) -> NDArray[np.int64]:
    """First row of each of at most `buckets` runs of rows."""
    return (np.arange(min(rows, buckets)) * (rows / max(1, min(rows, buckets)))).astype(np.int64)


def bucket_last(starts: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Last row of each bucket: where its point is drawn."""
    return np.append(starts[1:], rows)[: len(starts)] - 1


def bucketed(values: Numbers, starts: NDArray[np.int64]) -> dict[str, Any]:
    """`mean` (and `low`, `high` where a bucket has several rows) of each bucket; null for one without a number."""
    if len(starts) == len(values):
        return {"mean": plain(values)}
    good = np.isfinite(values)
    number = np.add.reduceat(good.astype(float), starts)
    with np.errstate(invalid="ignore"):
        mean = np.add.reduceat(np.where(good, values, 0.0), starts) / number
    low = np.minimum.reduceat(np.where(good, values, np.inf), starts)
    high = np.maximum.reduceat(np.where(good, values, -np.inf), starts)
    return {"mean": plain(mean, 7), "low": plain(low, 7), "high": plain(high, 7)}


def _axis(run: RunLog, rows: NDArray[np.int64], origin: float) -> dict[str, list[Any]]:
    metrics = run.metrics
    return {
        "step": metrics.step[rows].tolist(),
        "tokens": plain(metrics["tokens"][rows]),
        "time": plain(np.round(metrics["time"][rows] - origin, 2)),
        "attempt": metrics.attempt[rows].tolist(),
    }


def _axis_at_steps(run: RunLog, steps: NDArray[np.int64], origin: float) -> dict[str, list[Any]]:
    return _axis(run, np.clip(np.searchsorted(run.metrics.step, steps), 0, len(run.metrics) - 1), origin)


def _load(run: RunLog, axes: dict[str, Any], series: dict[str, Any], origin: float) -> dict[str, Any] | None:
    """The expert load apart from its pictures; adds one series per layer, or one over many layers."""
    load = run.metrics.load
    if load is None:
        return None
    axes["load"] = _axis_at_steps(run, load.edges[1:] - 1, origin)
    first, layers = first_moe_layer(run.recipe), load.imbalance.shape[1]
    if layers <= MAX_SOURCES:
        for layer in range(layers):
            series[f"imbalance_{layer}"] = {"axis": "load", "mean": plain(load.imbalance[:, layer], 5)}
    else:
        ordered = np.sort(load.imbalance, axis=1)
        series["imbalance_median"] = {
            "axis": "load",
            "mean": plain(ordered[:, layers // 2], 5),
            "low": plain(ordered[:, 0], 5),
            "high": plain(ordered[:, -1], 5),
        }
        series["imbalance_worst"] = {"axis": "load", "mean": plain(ordered[:, -1], 5)}
    return {
        "edges": load.edges.tolist(),
        "layers": [first + i for i in range(layers)],
        "experts": load.ratio.shape[2],
        "tail_first_step": load.tail_first_step,
        "tail_ratio": plain(load.tail_ratio, 4),
        "tail_imbalance": plain(load.tail_imbalance, 5),
        "palette": ["#" + bytes(colour).hex() for colour in heat.palette()],
        "octaves": heat.OCTAVES,
    }


def _sources(history: SourceHistory | None) -> dict[str, Any] | None:
    """Shares of the samples; the smallest of many sources are added up."""
    if history is None:
        return None
    names, samples, total = history.names, history.samples, history.total
    if len(names) > MAX_SOURCES:
        rest = MAX_SOURCES - 1
        names = [*names[:rest], f"{len(names) - rest} others"]
        samples = np.concatenate([samples[:, :rest], samples[:, rest:].sum(axis=1, keepdims=True)], axis=1)
        total = np.append(total[:rest], total[rest:].sum())
    with np.errstate(invalid="ignore"):
        share = samples / samples.sum(axis=1, keepdims=True)
    return {
        "edges": history.edges.tolist(),
        "names": names,
        "share": [plain(share[:, i], 4) for i in range(len(names))],
        "samples": plain(total),
    }


def _attempt(run: RunLog, place: int, origin: float) -> dict[str, Any]:
    attempt = run.attempts[place]
    return {
        "number": attempt.number,
        "start": attempt.start_step,
        "end": attempt.end_step,
        "kept": attempt.kept_step,
        "start_time": round(attempt.start_time - origin, 2),
        "end_time": round(attempt.end_time - origin, 2),
        "outcome": attempt.outcome,
    }


def checkpoints(run: RunLog, origin: float) -> list[dict[str, Any]]:
    """Checkpoints by step, those on disk and those that events tell of; `state`: whole, incomplete or removed."""
    found = {
        event.step: {"step": event.step, "time": round(event.time - origin, 2), "state": "removed", "bytes": None}
        for event in run.events
        if event.kind == "checkpoint"
    }
    for one in run.checkpoints:
        known = found.get(one.step, {"time": round(one.written - origin, 2)})
        state = "whole" if one.committed else "incomplete"
        found[one.step] = {"step": one.step, "time": known["time"], "state": state, "bytes": one.size_bytes}
    return [found[step] for step in sorted(found)]


def events(run: RunLog, origin: float) -> list[dict[str, Any]]:
    """Events other than checkpoints and validations, which the page shows in their own right; the newest EVENTS."""
    shown = [event for event in run.events if event.kind not in ("checkpoint", "validation")]
    return [
        {
            "time": round(event.time - origin, 2),
            "step": event.step,
            "attempt": event.attempt,
            "kind": event.kind,
            "message": event.message,
        }
        for event in shown[-EVENTS:]
    ]
