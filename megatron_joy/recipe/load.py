"""From a name or a file and overrides to a recipe: parse, derive, validate, and every error at once."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_joy.errors import UserError

from .derive import MOOT, derive, without_mtp
from .dump import format_value
from .fields import default_of, schema_rows, with_value
from .repair import check_schema
from .schema import Recipe
from .validate import validate

SHIPPED = Path(__file__).parent / "shipped"
EXTENDS = "extends"


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that comes with the package."""

    name: str
    description: str
    path: Path


@dataclass(frozen=True)
class Layer:
    """One source of keys: a file of the `extends` chain or the overrides."""

    origin: str
    table: dict[str, Any]


@dataclass(frozen=True)
class Parsed:
    """A recipe as written, before derive.

    recipe holds placeholders at `broken` keys, each of which has a line in `problems`. given maps each written key to
    the layer that wrote it last: 0 is the root of the `extends` chain, the overrides are the last.
    """

    recipe: Recipe
    given: Mapping[str, int]
    origin: str
    problems: tuple[str, ...] = ()
    broken: frozenset[str] = frozenset()


def list_recipes() -> list[ShippedRecipe]:
    """The recipes that come with the package, by name."""
    found = []
    for path in sorted(SHIPPED.glob("*.toml")):
        found.append(ShippedRecipe(path.stem, _read(path).get("description", ""), path))
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(
            f"recipe {path}: cannot be read ({error.strerror}); give a TOML file or a shipped name"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {path}: not TOML, {error}; mend the syntax there") from None
    except RecursionError:
        raise UserError(f"recipe {path}: not a recipe, its values are nested too deeply; flatten them") from None


def _locate(name_or_path: str, folder: Path) -> tuple[str, Path]:
    """The label and file of a shipped name or of a path relative to `folder`."""
    shipped = SHIPPED / f"{name_or_path}.toml"
    if name_or_path.isidentifier() and shipped.is_file():
        return name_or_path, shipped
    path = folder / name_or_path
    if path.is_file():
        return str(path), path
    names = [path.stem for path in sorted(SHIPPED.glob("*.toml"))]
    near = difflib.get_close_matches(name_or_path.removesuffix(".toml"), names, n=1)
    found = "is a folder" if path.is_dir() else "no such file or shipped recipe"
    fix = f"the nearest shipped name is {near[0]}" if near else f"shipped names are {', '.join(names)}"
    raise UserError(f"recipe {name_or_path}: {found}; {fix}")


def read_chain(name_or_path: str) -> list[Layer]:
    """The file and all that it extends, the root first. Raises UserError on a missing file, bad TOML or a cycle."""
    layers: list[Layer] = []
    seen: dict[Path, str] = {}
    pending: Any = name_or_path
    folder = Path()
    while pending is not None:
        if not isinstance(pending, str):
            where = layers[-1].origin
            raise UserError(
                f'recipe {where}: extends = {format_value(pending)}: expects one name or path, as "joyai_tiny"'
            )
        origin, path = _locate(pending, folder)
        if path.resolve() in seen:
            chain = " -> ".join([*seen.values(), origin])
            raise UserError(f"recipe {origin}: extends itself ({chain}); take `extends` out of one of them")
        seen[path.resolve()] = origin
        table = _read(path)
        pending = table.pop(EXTENDS, None)
        layers.append(Layer(origin, table))
        folder = path.parent
    return layers[::-1]


def _override_value(key: str, text: str) -> Any:
    """A value as TOML; text that isn't TOML is a bare string, and what a text key gets is always text."""
    row = schema_rows().get(".".join("N" if part.isdigit() else part for part in key.split(".")))
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text.lstrip()[:1] in ("[", "{", '"', "'"):
            raise UserError(
                f"override {key}={text}: the value is not TOML, {error}; mend the brackets or quotes"
            ) from None
        return text
    value = parsed["value"] if len(parsed) == 1 else text
    return text if row is not None and row.is_text and not isinstance(value, str) else value


def _assign(root: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested tables and lists; a list grows by one at its end."""
    parts = key.split(".")
    node: Any = root
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        if not isinstance(node, list | dict):
            raise UserError(f"override {key}: {above} is a single value, not a table; set {above} itself")
        slot: Any = part
        if isinstance(node, list):
            slot = int(part) if part.isdigit() else -1
            if not 0 <= slot <= len(node):
                raise UserError(
                    f"override {key}: {above} has {len(node)} entries; the index goes from 0 to {len(node)}"
                )
            node += [{}] * (slot == len(node))
        if depth == len(parts) - 1:
            node[slot] = value
        elif isinstance(node, dict) and slot not in node:
            node[slot] = [] if parts[depth + 1].isdigit() else {}
        node = node[slot]


def read_overrides(overrides: Sequence[str], base: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Apply `key.path=value` to a copy of `base`: the new tables, and the keys that were set."""
    merged = _merge({}, base)
    keys = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.strip().split(".")):
            raise UserError(f"override {text!r}: expects key.path=value, as seed=7")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"override {key.strip()!r}: the value is not UTF-8; write it in UTF-8") from None
        _assign(merged, key.strip(), _override_value(key.strip(), value.strip()))
        keys.append(key.strip())
    return merged, keys


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Tables merge key by key; everything else (lists too) is replaced. Neither argument is changed."""
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        if isinstance(value, dict):
            merged[key] = _merge(known if isinstance(known, dict) else {}, value)
        elif isinstance(value, list):
            merged[key] = [_merge({}, item) if isinstance(item, dict) else item for item in value]
        else:
            merged[key] = value
    return merged


def _written_keys(table: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of a table's values; a list is one value."""
    keys: list[str] = []
    for name, value in table.items():
        keys += _written_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return keys


def parse(name_or_path: str, overrides: Sequence[str] = ()) -> Parsed:
    """Read, merge and check single fields. Raises UserError only where nothing can be read at all."""
    layers = read_chain(name_or_path)
    merged: dict[str, Any] = {}
    given: dict[str, int] = {}
    for number, layer in enumerate(layers):
        merged = _merge(merged, layer.table)
        given |= dict.fromkeys(_written_keys(layer.table), number)
    merged, keys = read_overrides(overrides, merged)
    # Setting an element (data.train.0.weight) or a whole table writes the keys above or below it.
    for key in keys:
        given[key] = len(layers)
        given |= {known: len(layers) for known in schema_rows() if known == key or f"{key}.".startswith(f"{known}.")}
        given |= {known: len(layers) for known in schema_rows() if known.startswith(f"{key}.")}
    origins = [*(f"recipe {layer.origin}" for layer in layers), "command line"]
    recipe, problems, broken = check_schema(merged)
    lines = [f"{_origin(problem.key, given, origins)}: {problem.text}" for problem in problems]
    return Parsed(recipe, given, layers[-1].origin, tuple(lines), broken)


def _origin(key: str, given: Mapping[str, int], origins: Sequence[str]) -> str:
    """Who wrote a key (or something under it) last; the outermost file for a key that nobody wrote."""
    layers = [
        number for known, number in given.items() if f"{key}.".startswith(f"{known}.") or known.startswith(f"{key}.")
    ]
    return origins[max(layers)] if layers else origins[-2]


def settle(parsed: Parsed) -> Parsed:
    """Take back inherited keys that a later layer made moot (see `derive.Moot`), those of stages too."""
    recipe, given = parsed.recipe, dict(parsed.given)
    for moot in MOOT:
        cause = max(given.get(key, -1) for key in moot.causes)
        if moot.key in given and cause > given[moot.key] and moot.when(recipe):
            recipe = with_value(recipe, moot.key, default_of(schema_rows()[moot.key].info))
            del given[moot.key]
    if given.get("model.num_nextn_predict_layers", -1) > given.get("stages", -1):
        recipe = without_mtp(recipe)
    return replace(parsed, recipe=recipe, given=given)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe of a shipped name or a TOML file with `key.path=value` overrides.

    Raises UserError with one line for each error of the recipe, all of them at once.
    """
    parsed = settle(parse(name_or_path, overrides))
    recipe = derive(parsed.recipe)
    rules = validate(recipe, parsed.given, parsed.broken)
    problems = [*parsed.problems, *(f"recipe {parsed.origin}: {problem}" for problem in rules)]
    if problems:
        raise UserError("\n".join(problems))
    return recipe
