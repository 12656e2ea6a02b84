"""`joy plan`: what a recipe's run will do, before it does it: its stages, and what they read of each source."""

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from launch import layouts as launch_layouts
from launch import plan as launch_plan
from megatron_joy.cli.plan_tables import plan_tables, run_text
from megatron_joy.cli.tables import console as wide_console
from megatron_joy.data.manifest import load_manifest, manifest_path
from megatron_joy.errors import UserError
from megatron_joy.parallel.gpus import Gpu, gpu_named
from megatron_joy.parallel.steptime import Assumptions
from megatron_joy.recipe import Recipe, load_recipe
from megatron_joy.recipe.timetable import Stage, Timetable
from megatron_joy.recipe.usage import check_caps, shares_of, update_that_reads
from megatron_joy.report import text

OF_RECIPES = ("gpu", "gpus", "mfu", "kernels", "links", "overlap", "layouts", "price")


def _share(name: str, text: str) -> Any:
    """An option between 1 % and all."""
    return typer.Option(name, min=0.01, max=1.0, help=text)


def command(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Argument(metavar="NAME|FILE", help="A shipped name or a TOML file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE ...", help="train.steps=100")] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="The GPU to plan for, as h100-80g.")] = "h100-80g",
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="GPUs of the run: sets the replicas.")] = None,
    mfu: Annotated[float | None, _share("--mfu", "Days by this MFU, not by the update's planned time.")] = None,
    kernels: Annotated[float, _share("--kernels", "Assumed share of the peak in computation alone.")] = 0.5,
    links: Annotated[float, _share("--links", "Assumed share of a link's peak in collectives.")] = 0.8,
    overlap: Annotated[float, typer.Option(min=0.0, max=1.0, help="Assumed share of communication hidden.")] = 0.0,
    layouts: Annotated[int | None, typer.Option(min=1, help="Rank layouts: so many for each sequence length.")] = None,
    price: Annotated[float, typer.Option("--price", min=0.0, help="Assumed price of a GPU hour.")] = 2.5,
    data: Annotated[
        str | None, typer.Option("--data", metavar="PIPELINE", help="Plan this pipeline from its sample run instead.")
    ] = None,
    cores: Annotated[int, typer.Option("--cores", min=1, help="With --data: cores that work at once.")] = 256,
    tokens: Annotated[float, typer.Option("--tokens", min=1.0, help="With --data: tokens to make.")] = 20e12,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value.")] = False,
) -> None:
    """Shows a recipe's stages, what is read of each source, memory, communication and time of an update, days, cost.

    With --data: core hours, wall time and disk of a data pipeline, from what its finished sample run cost.

    Examples: joy plan joyai_48b_a3b --gpus 512 --gpu h100-80g; joy plan --data demo --cores 512 --tokens 20e12
    """
    _refuse_dead_options(context, data)
    if data is not None:
        from megatron_joy.cli.data_plan import show

        show(data, [text for text in (recipe, *(overrides or ())) if text is not None], cores, tokens, as_json)
        return
    if recipe is None:
        raise UserError("joy plan: no recipe given; give a name or a file (joy recipe list), or --data PIPELINE")
    device, loaded = gpu_named(gpu), load_recipe(recipe, overrides or ())
    if gpus is not None:
        loaded = load_recipe(recipe, [*(overrides or ()), _replicas(loaded, gpus)])
    assumed = Assumptions(kernels, links, overlap)
    plan = schedule_plan(loaded) | {"gpu": gpu} | _layout_plan(loaded, device, assumed)
    plan["run"] = launch_plan.run_plan(loaded, device, assumed, mfu, price)
    if layouts is not None:
        found = launch_layouts.rankings(loaded, loaded.layout.world_size, device, assumed, layouts)
        plan["layouts"] = [one.as_json() for one in found]
    if as_json:
        print(json.dumps(plan, indent=2, ensure_ascii=False))
        return
    console = wide_console()
    for table in (_stage_table(plan), _source_table(plan), *plan_tables(plan)):
        console.print(table)
    console.print(run_text(plan), highlight=False)


def _layout_plan(recipe: Recipe, gpu: Gpu, assumed: Assumptions) -> dict[str, Any]:
    """Memory, communication and seconds of an update, at each sequence length."""
    steps = []
    for form, time in launch_layouts.times(recipe, gpu, assumed):
        told = {"sequence_length": form.data.sequence_length, "global_batch_size": form.train.global_batch_size}
        mfu = time.mfu(gpu, form.layout.world_size)
        steps.append(told | asdict(time) | {"seconds": time.seconds, "mfu": mfu})
    return {
        "memory": launch_plan.memory_plan(recipe, gpu),
        "communication": launch_layouts.traffic(recipe),
        "assumptions": asdict(assumed),
        "step": steps,
    }


def _refuse_dead_options(context: typer.Context, data: str | None) -> None:
    """An option without effect is a mistake: the GPU's with --data, the pipeline's without."""
    dead = OF_RECIPES if data is not None else ("cores", "tokens")
    for name in dead:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise UserError(f"--{name}: has no effect {'with' if data is not None else 'without'} --data; remove it")


def _replicas(recipe: Recipe, gpus: int) -> str:
    size = recipe.layout.model_parallel_size
    if gpus % size:
        near = max(size, round(gpus / size) * size)
        raise UserError(f"--gpus {gpus}: must be a multiple of TP x CP x PP = {size}; the nearest is {near}")
    return f"layout.data_parallel_size={gpus // size}"


def schedule_plan(recipe: Recipe) -> dict[str, Any]:
    """The schedule as plain values; tokens of a source in a stage are exact to within a sample."""
    timetable = Timetable(recipe)
    available = {source.label: _available(source.manifest) for source in recipe.data.train}
    stages = [_stage(stage, available) for stage in timetable.stages]
    sources = []
    for source in recipe.data.train:
        uses = [one["tokens"] for stage in stages for one in stage["blend"] if one["source"] == source.label]
        tokens = available[source.label]
        again = update_that_reads(recipe, source.label, tokens) if tokens else None
        has = {"manifest": source.manifest, "available_tokens": tokens, "max_epochs": source.max_epochs}
        sources.append(_use(source.label, sum(uses), tokens) | has | {"second_epoch_from_update": again})
    check_caps(recipe, {label: tokens for label, tokens in available.items() if tokens})
    return {
        "name": recipe.name,
        "steps": timetable.steps,
        "samples": timetable.samples,
        "tokens": timetable.tokens,
        "stages": stages,
        "sources": sources,
    }


def _available(manifest: str) -> int | None:
    """Tokens of a source; None where there are no shards yet. Raises UserError for a manifest that is damaged."""
    return load_manifest(manifest).totals.tokens if Path(manifest_path(manifest)).is_file() else None


def _use(source: str, tokens: int, available: int | None) -> dict[str, Any]:
    return {"source": source, "tokens": tokens, "epochs": tokens / available if available else None}


def _stage(stage: Stage, available: dict[str, int | None]) -> dict[str, Any]:
    shares = shares_of(stage)
    return {
        "name": stage.name,
        "first_step": stage.first_step + 1,
        "last_step": stage.last_step,
        "steps": stage.steps,
        "samples": stage.samples,
        "tokens": stage.tokens,
        "sequence_length": stage.sequence_length,
        "global_batch_size": [stage.ramp.first, stage.ramp.last],
        "batch_tokens": [stage.ramp.first * stage.sequence_length, stage.ramp.last * stage.sequence_length],
        "learning_rate": [stage.curves[0].start, *(curve.end for curve in stage.curves)],
        "learning_rate_shapes": [curve.shape for curve in stage.curves],
        "mtp_loss_factor": stage.mtp_loss_factor,
        "rope_theta": stage.rope_theta,
        "router_bias_update_rate": stage.router_bias_update_rate,
        "min_longest_document": stage.min_longest_document,
        "blend": [
            _use(label, round(share * stage.tokens), available[label]) | {"share": float(share)}
            for label, share in shares.items()
        ],
    }


def _from_to(values: list[Any], write: Any) -> str:
    steps = [write(values[0])] + [write(b) for a, b in pairwise(values) if b != a]
    return " → ".join(steps)


def _stage_table(plan: dict[str, Any]) -> Table:
    title = f"{plan['name']}: {text.whole(plan['steps'])} updates, {text.count(plan['tokens'])} tokens"
    table = Table(title=escape(title), box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    for name in ("updates", "tokens", "batch", "sequence", "learning rate", "MTP", "RoPE base"):
        table.add_column(name, justify="right", overflow="fold")
    for stage in plan["stages"]:
        table.add_row(
            escape(stage["name"]),
            f"{stage['first_step']}-{stage['last_step']}",
            text.count(stage["tokens"]),
            f"{_from_to(stage['batch_tokens'], text.count)} ({_from_to(stage['global_batch_size'], str)})",
            str(stage["sequence_length"]),
            _from_to(stage["learning_rate"], text.general),
            text.general(stage["mtp_loss_factor"]) if stage["mtp_loss_factor"] else "off",
            text.general(stage["rope_theta"]),
        )
    return table


def _source_table(plan: dict[str, Any]) -> Table:
    """What each stage, and the whole run, reads of each source; epochs where the shards are there."""
    table = Table(title="what is read of each source", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("stage", "source"):
        table.add_column(name, no_wrap=True)
    for name in ("share", "tokens", "epochs", "read again from"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in [*plan["stages"], {"name": "all", "blend": plan["sources"]}]:
        for number, use in enumerate(stage["blend"]):
            epochs = "no shards yet" if use["epochs"] is None else text.significant(use["epochs"])
            share = f"{use['tokens'] / sum(one['tokens'] for one in stage['blend']):.1%}"
            name = "" if number else escape(stage["name"])
            again = use.get("second_epoch_from_update")
            cells = (share, text.count(use["tokens"]), epochs, f"update {text.whole(again)}" if again else "")
            table.add_row(name, escape(use["source"]), *cells)
        table.add_section()
    return table
