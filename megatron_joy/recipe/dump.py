"""A recipe as TOML: deterministic, every key of the schema, and loading it gives an equal recipe.

A key that has no effect in this recipe, or that only says what is derived anyway, is written as a comment: it stays
readable, and a later override (another layout for a resume) is free to change what it followed from.
"""

import json
from collections.abc import Iterator
from typing import Any

from .derive import DERIVED, MOOT
from .fields import section_of, value_at
from .schema import Recipe, Section


def format_value(value: Any) -> str:
    """A value as TOML on one line; what TOML can't say (None) in angle brackets, for messages only."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    if isinstance(value, Section):
        value = value.model_dump()
    if isinstance(value, dict):
        pairs = (
            f"{key if key.isidentifier() else format_value(key)} = {format_value(item)}" for key, item in value.items()
        )
        return "{" + ", ".join(pairs) + "}"
    return "<none>" if value is None else str(value)


def _comments(recipe: Recipe) -> dict[str, str]:
    """Keys that are written as comments, with the reason."""
    notes = {moot.key: f"no effect here: {moot.why}" for moot in MOOT if moot.why and moot.when(recipe)}
    for key, rule in DERIVED.items():
        if value_at(recipe, key) == rule(recipe):
            notes.setdefault(key, "derived")
    return notes


def _table(header: str, prefix: str, section: Section, notes: dict[str, str]) -> Iterator[str]:
    """A table's lines: its own values first, then its tables, as TOML wants it."""
    nested: list[str] = []
    values: list[str] = []
    for name, info in type(section).model_fields.items():
        value, key = getattr(section, name), prefix + name
        kind = section_of(info.annotation)
        if kind is None or (kind[1] and not value):
            line = f"{name} = {format_value(value)}"
            if value is None or key in notes:
                line = f"# {line}  # {notes.get(key, 'not set')}"
            values.append(line)
        elif kind[1]:
            for item in value:
                nested += _table(f"[[{key}]]", f"{key}.", item, notes)
        else:
            nested += _table(f"[{key}]", f"{key}.", value, notes)
    yield from ["", header, *values] if header else values
    yield from nested


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML text that `load_recipe` reads back to an equal recipe."""
    return "\n".join(_table("", "", recipe, _comments(recipe))) + "\n"
