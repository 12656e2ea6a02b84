"""The tables of `joy plan --data`: what a data pipeline costs, extrapolated from its sample run."""

import json
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_pipeline.config import load_pipeline
from data_pipeline.planner import HOUR, plan_data
from megatron_joy.report import text


def show(pipeline: str, overrides: Sequence[str], cores: int, tokens: float, as_json: bool) -> None:
    """Print the plan. Raises UserError as plan_data does."""
    plan = plan_data(load_pipeline(pipeline, overrides), tokens, cores)
    if as_json:
        print(json.dumps(plan, indent=2, ensure_ascii=False))
        return
    console = Console()
    console.print(_table(plan))
    console.print(_words(plan), highlight=False)


def _table(plan: dict[str, Any]) -> Table:
    title = f"{plan['pipeline']}: {text.count(plan['tokens'])} tokens on {plan['cores']} cores"
    table = Table(title=escape(title), box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    for name in ("CPU seconds of the sample", "core hours", "by the clock", "disk", "memory of a worker"):
        table.add_column(name, justify="right")
    for stage in plan["stages"]:
        table.add_row(
            stage["stage"],
            f"{stage['sample_cpu_seconds']:.1f}",
            text.count(stage["core_hours"]),
            text.duration(stage["wall_hours"] * HOUR),
            text.size(stage["disk_bytes"]),
            text.size(stage["worker_bytes"]),
        )
    whole = (
        text.count(plan["core_hours"]),
        text.duration(plan["wall_hours"] * HOUR),
        text.size(plan["peak_disk_bytes"]),
        text.size(max(stage["worker_bytes"] for stage in plan["stages"])),
    )
    table.add_row("all", f"{plan['sample']['cpu_seconds']:.1f}", *whole, style="bold")
    return table


def _words(plan: dict[str, Any]) -> str:
    sample = plan["sample"]
    amounts = f"{text.count(sample['tokens'])} tokens, {text.size(sample['text_bytes'])} of text"
    shards = f"{text.size(plan['shard_bytes'])} in {text.whole(plan['shards'])} shards of the sample's size"
    return "\n".join(
        (
            f"Measured on {amounts}; its workers used {sample['busy']:.0%} of a core each.",
            f"Shards take {shards}; up to {text.size(plan['peak_disk_bytes'])} are there before the run ends.",
            *plan["assumptions"],
        )
    )
