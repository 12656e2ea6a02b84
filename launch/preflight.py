"""Judges what all ranks measured of their nodes before a run: which node is bad, and why, for people and for programs.

The verdict is logs/preflight.json in the run's folder: `ok`, `nodes` (name -> `ok`, `ranks`, `reasons`), `reasons` that
are no single node's, and what was measured. Importing this imports no torch; the ranks do.
"""

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import local
from megatron_joy.data.atomic import write_atomically
from megatron_joy.errors import UserError, WorkError
from megatron_joy.recipe import Recipe
from megatron_joy.runstate import VERDICT_FILE

Report = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What is too much or too little.

    `slow`: a product may take so many times the median of all ranks; None: 1.2 on GPUs, 4 on CPUs, whose cores others
    use too. `clock`: seconds between a node's clock and the median. `bandwidth`: bytes/s on the bus of the largest
    all-reduce, None where nothing is expected.
    """

    slow: float | None = None
    clock: float = 1.0
    bandwidth: float | None = None


def judge(reports: Sequence[Report], limits: Limits) -> dict[str, Any]:
    """The verdict on the reports of all ranks, in the order of ranks."""
    reasons: dict[str, list[str]] = {report["node"]: [] for report in reports}
    for report in reports:
        reasons[report["node"]] += [f"rank {report['rank']}: {reason}" for reason in _of_rank(report, reports, limits)]
    for node in reasons:
        reasons[node] = [*_of_node(node, reports), *reasons[node]]
    shared = _of_world(reports, limits)
    return {
        "ok": not shared and not any(reasons.values()),
        "time": time.time(),
        "reasons": shared,
        "nodes": {
            node: {
                "ok": not found,
                "ranks": [report["rank"] for report in reports if report["node"] == node],
                "reasons": found,
            }
            for node, found in reasons.items()
        },
        "measured": _measured(reports),
    }


def _of_rank(report: Report, reports: Sequence[Report], limits: Limits) -> Iterable[str]:
    for name, found in report["software"].items():
        wanted, times = _usual(each["software"][name] for each in reports)
        if found != wanted:
            yield f"{name} {found}, {times} of {len(reports)} ranks have {wanted}"
    product = report["product"]
    if not product["exact"]:
        yield "a matrix product came out wrong: its processor can't be trusted"
    alike = [each["product"]["seconds"] for each in reports if _device(each) == _device(report)]
    # The lower median: of two ranks the quicker one is right.
    usual, slow = statistics.median_low(alike), limits.slow or (4.0 if report["gpu"] is None else 1.2)
    if product["seconds"] > slow * usual:
        times = product["seconds"] / usual
        yield f"its matrix product took {times:.1f} times the median ({product['seconds']:.4f} s, {usual:.4f} s)"
    if report["files"]["error"] is not None:
        yield f"run.folder: {report['files']['error']}"
    if abs(report["clock"]) > limits.clock:
        yield f"its clock is {abs(report['clock']):.1f} s {'ahead' if report['clock'] > 0 else 'behind'}"


def _device(report: Report) -> str | None:
    return None if report["gpu"] is None else report["gpu"]["name"]


def _usual(values: Iterable[Any]) -> tuple[Any, int]:
    """The most frequent value and how often it is there; of two that are as frequent, that of the lower rank."""
    return Counter(values).most_common(1)[0]


def _of_node(node: str, reports: Sequence[Report]) -> Iterable[str]:
    here = [report["gpu"] for report in reports if report["node"] == node]
    if not any(report["gpu"] for report in reports):
        return
    if None in here:
        yield "a rank without a GPU, other ranks have one"
        return
    for what in ("name", "memory"):
        wanted, _ = _usual(report["gpu"][what] for report in reports if report["gpu"])
        if other := next((gpu[what] for gpu in here if gpu[what] != wanted), None):
            yield f"a GPU with {what} {other}, other ranks have {wanted}"
    if len({gpu["uuid"] for gpu in here}) < len(here):
        yield f"{len(here)} ranks share {len({gpu['uuid'] for gpu in here})} GPUs; each needs its own"
    for gpu in here:
        yield from gpu["problems"]


def _of_world(reports: Sequence[Report], limits: Limits) -> list[str]:
    sizes = reports[0].get("collectives", {}).get("all_reduce", [])
    if limits.bandwidth is None or not sizes:
        return []
    found = _measured(reports)["collectives"]["all_reduce"][-1]["bus"]
    if found >= limits.bandwidth:
        return []
    return [
        f"all-reduce of {sizes[-1]['bytes']:,} bytes: {found / 1e9:.2f} GB/s on the bus, expected "
        f"{limits.bandwidth / 1e9:.2f}; no single node is to blame by this test"
    ]


def _measured(reports: Sequence[Report]) -> dict[str, Any]:
    products = [report["product"]["flops"] for report in reports]
    found: dict[str, Any] = {
        "ranks": len(reports),
        "software": reports[0]["software"],
        "product_flops": {"least": min(products), "median": statistics.median(products)},
        "write_seconds": max((report["files"].get("write_seconds", 0.0) for report in reports), default=0.0),
        "read_seconds": max((report["files"].get("read_seconds", 0.0) for report in reports), default=0.0),
        "clock_seconds": max((report["clock"] for report in reports), key=abs),
        "collectives": {},
    }
    for kind, sizes in reports[0].get("collectives", {}).items():
        found["collectives"][kind] = [
            {"bytes": size["bytes"]}
            | {key: middle(each["collectives"][kind][index][key] for each in reports) for key, middle in MIDDLE.items()}
            for index, size in enumerate(sizes)
        ]
    return found


# The longer of two middle times and the lower of two middle bandwidths are the same rank's: they belong together.
MIDDLE = {"seconds": statistics.median_high, "bus": statistics.median_low}


def write_verdict(folder: Path, verdict: dict[str, Any]) -> None:
    """Puts the verdict into the run's folder; where that can't be written, the verdict says so already."""
    path = folder / VERDICT_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(verdict, indent=2).encode())
    except OSError as error:
        print(f"note: {path}: {error.strerror}; the verdict is not kept", file=sys.stderr)


def summary(verdict: dict[str, Any]) -> str:
    """The verdict in a line: the first bad node and its first reason, and how many more there are."""
    bad = {node: found["reasons"] for node, found in verdict["nodes"].items() if not found["ok"]}
    if not bad:
        return f"preflight: {verdict['reasons'][0]}" if verdict["reasons"] else "preflight: all nodes are fit"
    (node, reasons), *others = bad.items()
    more = f" (and {len(others)} more: {', '.join(name for name, _ in others)})" if others else ""
    return f"preflight: node {node}: {reasons[0]}{more}"


def rank_command(recipe_name: str, overrides: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    """The command of every rank."""
    return [sys.executable, "-m", "megatron_joy.cli.main", "preflight", recipe_name, *overrides, *options]


def run_here(recipe: Recipe, recipe_name: str, overrides: Sequence[str], options: Sequence[str] = ()) -> None:
    """Starts the recipe's ranks on this machine to measure it.

    Raises WorkError with the verdict in a line, or with what the first rank that failed said.
    """
    world = local.start(recipe, recipe_name, overrides, rank_command(recipe_name, overrides, options))
    with world.forwarding_signals():
        world.wait()
    world.reasons.close()
    if world.failure is not None:
        kind = UserError if world.failure.exit_code == local.EXIT_USER_MISTAKE else WorkError
        raise kind(world.failure.message)
    if world.cut_short or world.asked_to_stop:
        raise WorkError("preflight: stopped before its verdict")
