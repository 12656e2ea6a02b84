"""The schema seen as a flat table of dotted keys: what errors, `--describe` and the resume table are written against.

An element of a list of tables has the index `N` in a key: `data.train.N.weight`.
"""

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .schema import Recipe, Section

BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


@dataclass(frozen=True)
class FieldRow:
    """One key of the schema."""

    key: str
    type: str
    required: bool
    default: Any
    description: str
    info: FieldInfo

    @property
    def is_text(self) -> bool:
        """Whether a value of this key is a string that isn't one of a few."""
        return self.type.startswith("text")


def literal_choices(annotation: Any) -> tuple[Any, ...]:
    """The values that a `Literal` allows; none for any other annotation."""
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def type_text(annotation: Any, metadata: list[Any] | None = None) -> str:
    """A type in words for a person: `int > 0`, `"fp32" or "bf16"`, `list of int > 0`."""
    if choices := literal_choices(annotation):
        return " or ".join(f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        rules = [rule for extra in arguments[1:] for rule in getattr(extra, "metadata", [extra])]
        return type_text(arguments[0], rules)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_text(part, metadata) for part in arguments if part is not type(None))
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} numbers, each {type_text(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    name = {str: "text", bool: "true or false"}.get(annotation, getattr(annotation, "__name__", str(annotation)))
    patterns = [f"matching {rule.pattern}" for rule in metadata or () if getattr(rule, "pattern", None)]
    if patterns:
        return " ".join([name, *patterns])
    limits = [
        f"{sign} {getattr(rule, bound)}" for rule in metadata or () for bound, sign in BOUNDS if hasattr(rule, bound)
    ]
    return " ".join([name, " and ".join(limits)]) if limits else name


def section_of(annotation: Any) -> tuple[type[Section], str] | None:
    """The section model behind an annotation and how its key goes on ("" for a table, ".N" for a list of tables)."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, ""
    if typing.get_origin(annotation) is list:
        (element,) = typing.get_args(annotation)
        if isinstance(element, type) and issubclass(element, Section):
            return element, ".N"
    return None


def _walk(model: type[Section], prefix: str) -> Iterator[FieldRow]:
    for name, info in model.model_fields.items():
        key = prefix + name
        nested = section_of(info.annotation)
        if nested is None or nested[1]:
            default = None if info.is_required() else info.get_default(call_default_factory=True)
            text = type_text(info.annotation, info.metadata)
            yield FieldRow(key, text, info.is_required(), default, info.description or "", info)
        if nested is not None:
            yield from _walk(nested[0], f"{key}{nested[1]}.")


@cache
def schema_rows() -> dict[str, FieldRow]:
    """Every leaf key of a recipe, in the schema's order."""
    return {row.key: row for row in _walk(Recipe, "")}


@cache
def section_names() -> dict[str, type[Section]]:
    """The tables of a recipe by key; the root is the empty key, an element of a list of tables ends in `.N`."""
    found: dict[str, type[Section]] = {"": Recipe}
    pending = [("", typing.cast(type[Section], Recipe))]
    while pending:
        prefix, model = pending.pop()
        for name, info in model.model_fields.items():
            if nested := section_of(info.annotation):
                key = f"{prefix}{name}{nested[1]}"
                found[key] = nested[0]
                pending.append((key + ".", nested[0]))
    return found


def generic(path: tuple[str | int, ...]) -> str:
    """A path as a schema key: list indices become N."""
    return ".".join("N" if isinstance(part, int) else part for part in path)


def value_at(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key (no list indices)."""
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def with_value(recipe: Recipe, key: str, value: Any) -> Recipe:
    """A copy of the recipe with another value at a dotted key; the value is trusted."""
    return _replaced(recipe, key.split("."), value)


def _replaced[T: BaseModel](section: T, path: list[str], value: Any) -> T:
    name, *rest = path
    return section.model_copy(update={name: _replaced(getattr(section, name), rest, value) if rest else value})


def default_of(info: FieldInfo) -> Any:
    """A field's default, or PydanticUndefined when it is required."""
    return PydanticUndefined if info.is_required() else info.get_default(call_default_factory=True)
