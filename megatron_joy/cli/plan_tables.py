"""What `joy plan` shows of memory, communication, time and layouts."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from launch.plan import GIB
from megatron_joy.report import text

MEMORY = ("parameters", "gradients", "optimizer", "activations", "workspace", "total", "spare", "dispatch_worst_case")
TRAFFIC = ("tensor", "context", "expert", "pipeline", "data")
SECONDS = ("products", "recomputed", "tensor", "context", "expert", "pipeline", "bubble", "data", "optimizer")


def plan_tables(plan: dict[str, Any]) -> list[Table]:
    """Memory, communication and seconds of an update, and layouts where they were asked for."""
    tables = [_memory(plan), _communication(plan), _seconds(plan)]
    return tables + ([_layouts(plan)] if "layouts" in plan else [])


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right", overflow="fold")
    return table


def _memory(plan: dict[str, Any]) -> Table:
    table = _table(f"GiB of a rank of {plan['gpu']}, by pipeline stage", ("sequence", "stage", *MEMORY, "verdict"))
    for row in plan["memory"]:
        cells = (f"{row[kind] / GIB:.1f}" for kind in MEMORY)
        table.add_row(str(row["sequence_length"]), str(row["stage"]), *cells, row["verdict"])
    return table


def _communication(plan: dict[str, Any]) -> Table:
    table = _table("GiB that a rank sends in an update, by pipeline stage", ("sequence", "stage", *TRAFFIC))
    for row in plan["communication"]:
        cells = (f"{row.get(kind, 0) / GIB:.2f}" for kind in TRAFFIC)
        table.add_row(str(row["sequence_length"]), str(row["stage"]), *cells)
    return table


def _seconds(plan: dict[str, Any]) -> Table:
    table = _table("seconds of an update, by what they go into", ("sequence", "batch", *SECONDS, "all", "MFU"))
    for row in plan["step"]:
        cells = (f"{row[kind]:.2f}" for kind in SECONDS)
        all_of_it = f"{row['seconds']:.2f}", f"{row['mfu']:.1%}"
        table.add_row(str(row["sequence_length"]), str(row["global_batch_size"]), *cells, *all_of_it)
    return table


def _layouts(plan: dict[str, Any]) -> Table:
    columns = ("sequence", "TP", "PP", "VPP", "CP", "EP", "DP", "recompute", "GiB", "seconds", "tokens/s a GPU", "MFU")
    table = _table(f"layouts for {plan['run']['gpus']} GPUs that fit, best first", columns)
    degrees = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "data", "recompute")
    before = None
    for row in plan["layouts"]:
        if before not in (None, row["sequence_length"]):
            table.add_section()
        before = row["sequence_length"]
        table.add_row(
            str(before),
            *(str(row[kind]) for kind in degrees),
            f"{row['memory'] / GIB:.1f}",
            f"{row['step_seconds']:.2f}",
            f"{row['tokens_per_second_per_gpu']:,.0f}",
            f"{row['mfu']:.1%}",
        )
    return table


def run_text(plan: dict[str, Any]) -> str:
    """The run in a few lines, with what is assumed."""
    run, assumed = plan["run"], plan["assumptions"]
    if run["given_mfu"] is None:
        by = f"by the update's planned time, an MFU of {run['mfu']:.1%}"
    else:
        by = f"at the given MFU of {run['given_mfu']:.1%}"
    lines = (
        f"{text.count(run['flops_per_token'])} FLOPs a token, whole sequences attended.",
        f"On {run['gpus']} GPUs, {by}:",
        f"{run['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU, {run['days']:,.1f} days,",
        f"{run['cost']:,.0f} at an assumed {run['assumed_price_per_gpu_hour']:g} a GPU hour.",
        f"Assumed: computation at {assumed['kernels']:.0%} of the peak, collectives at {assumed['links']:.0%} of the "
        f"links', {assumed['overlap']:.0%} of them hidden; 8 GPUs a node with a network card each.",
        "Dispatch worst case: what one layer adds if all tokens go to one rank's experts; not in the total.",
    )
    return "\n".join(lines)
