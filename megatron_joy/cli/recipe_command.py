"""`joy recipe`: list the shipped recipes, show one resolved, its keys, its parameter counts."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from megatron_joy.cli.tables import console as wide_console
from megatron_joy.data.atomic import write_atomically
from megatron_joy.errors import UserError
from megatron_joy.parallel import flops
from megatron_joy.recipe import Recipe, dump_recipe, list_recipes, load_recipe
from megatron_joy.recipe.dump import format_value
from megatron_joy.recipe.fields import FieldRow, schema_rows, value_at
from megatron_joy.recipe.sweep import Rules, ladder
from megatron_joy.report.parameters import count_parameters

app = typer.Typer(help="List and show recipes. Example: joy recipe show joyai_tiny train.steps=100")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


@app.command("list", epilog="Example: joy recipe list --json")
def list_command(as_json: Json = False) -> None:
    """List the recipes that come with the package."""
    recipes = list_recipes()
    if as_json:
        _print_json([{"name": recipe.name, "description": recipe.description} for recipe in recipes])
        return
    width = max(len(recipe.name) for recipe in recipes)
    for recipe in recipes:
        print(f"{recipe.name:<{width}}  {recipe.description}")


@app.command("show", epilog="Example: joy recipe show joyai_48b_a3b --size")
def show_command(
    recipe: Annotated[str | None, typer.Argument(metavar="NAME|FILE", help="A shipped name or a TOML file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE ...", help="train.steps=100")] = None,
    describe: Annotated[bool, typer.Option("--describe", help="Every key: type, default, meaning.")] = False,
    size: Annotated[bool, typer.Option("--size", help="Parameter counts by kind, total and active.")] = False,
    as_json: Json = False,
) -> None:
    """Show a recipe resolved: everything that it extends, overrides and derived values in place."""
    if describe and size:
        raise UserError("joy recipe show: --describe and --size are two different lists; ask for one of them")
    if recipe is None:
        if not describe:
            raise UserError("joy recipe show: which recipe? Give a name or a file, as joy recipe show joyai_tiny")
        _describe(None, as_json)
        return
    loaded = load_recipe(recipe, overrides or ())
    if describe:
        _describe(loaded, as_json)
    elif size:
        _size(loaded, as_json)
    elif as_json:
        _print_json(loaded.model_dump())
    else:
        print(dump_recipe(loaded), end="")


def _active(recipe: Recipe) -> int:
    counts = count_parameters(recipe.model.model_dump())
    return counts.active if counts else 0


def _flops(recipe: Recipe) -> float:
    """Of the whole run, attention over whole samples: documents make it less."""
    tokens = recipe.train.steps * recipe.train.global_batch_size * recipe.data.sequence_length
    return tokens * flops.per_token(recipe, (recipe.data.sequence_length + 1) / 2, recipe.model.mtp_loss_factor > 0)


@app.command("sweep", epilog="Example: joy recipe sweep joyai_tiny --out ladder --widths 64,96,128,192")
def sweep_command(
    recipe: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped name or a TOML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE ...", help="train.steps=100")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the recipes.")] = Path("ladder"),
    widths: Annotated[str, typer.Option("--widths", help="Hidden sizes, as 64,96,128.")] = "",
    tokens_per_parameter: Annotated[
        float, typer.Option("--tokens-per-parameter", min=0.001, help="Training tokens over active parameters.")
    ] = 20.0,
    lr_exponent: Annotated[
        float, typer.Option("--lr-exponent", help="Learning rates go with width to this power.")
    ] = -1.0,
    as_json: Json = False,
) -> None:
    """Write a ladder of recipes: one model in several widths, depth, heads, rates and tokens by constant rules."""
    parts = [part.strip() for part in widths.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise UserError(f"--widths {widths}: expected whole numbers with commas between them, as 64,96,128")
    made = ladder(recipe, overrides or (), [*map(int, parts)], Rules(tokens_per_parameter, lr_exponent), _active)
    files = {out / f"{one.name}.toml": dump_recipe(one).encode() for one in made}
    if taken := [str(path) for path, text in files.items() if path.exists() and path.read_bytes() != text]:
        raise UserError(f"{', '.join(taken)}: exists and is another recipe; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        write_atomically(path, text)
    _show_ladder(dict(zip(files, made, strict=True)), as_json)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _show_ladder(made: dict[Path, Recipe], as_json: bool) -> None:
    rows: list[dict[str, str | float]] = [
        {
            "file": str(path),
            "hidden_size": one.model.hidden_size,
            "layers": one.model.num_hidden_layers,
            "active_parameters": _active(one),
            "peak_lr": one.schedule.peak_lr,
            "steps": one.train.steps,
            "tokens": one.train.steps * one.train.global_batch_size * one.data.sequence_length,
            "flops": _flops(one),
        }
        for path, one in made.items()
    ]
    if as_json:
        _print_json(rows)
        return
    table = Table()
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "file" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else _number(value) for value in row.values()))
    wide_console().print(table)


def _default(row: FieldRow) -> str:
    return "required" if row.required else format_value(row.default)


def _describe(recipe: Recipe | None, as_json: bool) -> None:
    """Every key of the schema; with a recipe, its value too (not inside a list of tables)."""
    rows = []
    for row in schema_rows().values():
        entry = {"key": row.key, "type": row.type, "default": _default(row), "description": row.description}
        if recipe is not None and ".N." not in row.key:
            entry["value"] = format_value(value_at(recipe, row.key))
        rows.append(entry)
    if as_json:
        _print_json(rows)
        return
    for entry in rows:
        value = f"; here {entry['value']}" if "value" in entry else ""
        print(f"{entry['key']}\n    {entry['type']}; default {entry['default']}{value}\n    {entry['description']}")


def _size(recipe: Recipe, as_json: bool) -> None:
    """Parameter counts by kind, counted on the model itself (built without memory)."""
    # Torch comes in only here.
    from megatron_joy.model.size import parameter_counts

    counts = parameter_counts(recipe)
    if as_json:
        _print_json({"name": recipe.name} | counts.as_json())
        return
    table = Table(title=f"Parameters of {recipe.name}")
    table.add_column("kind")
    table.add_column("total", justify="right")
    table.add_column("active per token", justify="right")
    for rows, name, total, active in (
        (counts.rows, "main model", counts.total, counts.active),
        (counts.mtp_rows, "MTP layer (tables shared)", counts.mtp, counts.mtp),
    ):
        for kind, of_kind, of_token in rows:
            table.add_row(kind, f"{of_kind:,}", f"{of_token:,}")
        table.add_section()
        if rows:
            table.add_row(name, f"{total:,}", f"{active:,}", style="bold", end_section=True)
    for name, active in counts.readings.items():
        table.add_row(f"active {name}", "", f"{active:,}")
    wide_console().print(table)
