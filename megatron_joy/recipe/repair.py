"""Single fields: pydantic's complaints in our words, and a recipe that is whole enough for the other checks.

To report all errors at once the rules between keys must run although some keys are wrong; so wrong keys get
placeholders, and the rules that would read them are not asked.
"""

import difflib
import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from .dump import format_value
from .fields import generic, literal_choices, schema_rows, section_names
from .schema import Recipe

PLACEHOLDERS: dict[str, Any] = {"int": 1, "float": 1.0, "text": "unknown"}
LONGEST_VALUE = 80
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?|true|false")
NAME_PATTERN = "[A-Za-z0-9._-]"
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
NEAREST = "the nearest known key is "
# What Megatron-LM, Hugging Face and people call a key whose own name is not near.
OTHER_NAMES = {
    "lr": "schedule.peak_lr",
    "learning_rate": "schedule.peak_lr",
    "max_lr": "schedule.peak_lr",
    "min_lr": "schedule.final_lr",
    "lr_warmup_iters": "schedule.warmup_steps",
    "train_iters": "train.steps",
    "max_steps": "train.steps",
    "batch_size": "train.global_batch_size",
    "seq_len": "data.sequence_length",
    "seq_length": "data.sequence_length",
    "max_seq_len": "data.sequence_length",
    "num_layers": "model.num_hidden_layers",
    "ffn_hidden_size": "model.intermediate_size",
    "num_experts": "model.n_routed_experts",
    "num_moe_experts": "model.n_routed_experts",
    "moe_router_topk": "model.num_experts_per_tok",
    "top_k": "model.num_experts_per_tok",
    "rotary_base": "model.rope_theta",
    "tp": "layout.tensor_model_parallel_size",
    "pp": "layout.pipeline_model_parallel_size",
    "cp": "layout.context_parallel_size",
    "ep": "layout.expert_model_parallel_size",
    "dp": "layout.data_parallel_size",
    "bf16": "precision.params_dtype",
    "dtype": "precision.params_dtype",
    "torch_dtype": "precision.params_dtype",
    "fp8": "precision.fp8.recipe",
    "grad_clip": "optimizer.clip_grad",
    "max_grad_norm": "optimizer.clip_grad",
    "save_interval": "checkpoint.interval",
    "eval_interval": "train.validation_interval",
}


@dataclass(frozen=True)
class Problem:
    """One wrong key and the line about it (without the origin)."""

    key: str
    text: str


def _short(value: Any) -> str:
    text = format_value(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def nearest_key(path: tuple[str | int, ...]) -> str:
    """The known key nearest to an unknown one: its name elsewhere, a near name in its own table, what others call so,
    a near name elsewhere, then the least far, whole or in a word of it.
    """
    *parents, last = path
    section = section_names()[generic(tuple(parents))]
    prefix = "".join(f"{part}." for part in parents)
    siblings = list(section.model_fields)
    elsewhere: dict[str, str] = {}
    for key in schema_rows():
        elsewhere.setdefault(key.rpartition(".")[2], key)
    if str(last) in elsewhere:
        return elsewhere[str(last)]
    if near := difflib.get_close_matches(str(last), siblings, n=1):
        return prefix + near[0]
    if str(last) in OTHER_NAMES:
        return OTHER_NAMES[str(last)]
    if near := difflib.get_close_matches(str(last), list(elsewhere), n=1, cutoff=0.75):
        return elsewhere[near[0]]
    return prefix + max(siblings, key=lambda name: _likeness(str(last), name))


def _likeness(word: str, name: str) -> float:
    """How near a word is to a name, or to one of the words in it."""
    return max(difflib.SequenceMatcher(None, word, part).ratio() for part in (name, *name.split("_")))


def _fix(key: str, value: Any) -> str:
    """The nearest value that a key takes."""
    row = schema_rows()[key]
    if choices := literal_choices(row.info.annotation):
        near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.4)
        return f"set {format_value(next((c for c in choices if near and str(c) == near[0]), choices[0]))}"
    if row.is_text and isinstance(value, str) and NAME_PATTERN in row.type:
        return f'set "{NOT_IN_NAMES.sub("-", value).strip("-._") or "run"}"'
    if row.is_text and isinstance(value, int | float):
        return f'write it in quotes, "{value}"'
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return f"write it without quotes, {value}"
    if isinstance(value, float) and value.is_integer() and row.type.startswith("int") and value > 0:
        return f"write {int(value)}"
    return f"set {format_value(_example(row.default, row.type))}"


def _example(default: Any, kind: str) -> Any:
    """A value of a kind to show: the default where there is one."""
    if default is not None:
        return default
    if " numbers, each " in kind:
        count, _, each = kind.partition(" numbers, each ")
        return [_example(None, each)] * int(count)
    if ">= 0" in kind:
        return 0 if kind.startswith("int") else 0.0
    return {"int": 1, "float": 1.0, "true": True, "list": [1], "text": "name"}.get(kind.split(" ")[0], "...")


def _known_part(path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The longest beginning of a path that is a key or a table of the schema."""
    while path and generic(path) not in schema_rows() and generic(path) not in section_names():
        path = path[:-1]
    return path


def _value_of(table: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        table = table[part]
    return table


def _describe(kind: str, path: tuple[str | int, ...], table: dict[str, Any]) -> Problem:
    key = ".".join(str(part) for part in path)
    if kind == "extra_forbidden":
        return Problem(key, f"{key} = {_short(_value_of(table, path))}: unknown key; {NEAREST}{nearest_key(path)}")
    name = generic(path)
    row = schema_rows().get(name)
    if kind == "missing":
        want = f"{row.type}, {row.description}" if row else "a table"
        return Problem(key, f"{key}: missing; give it a value ({want})")
    found = _short(_value_of(table, path))
    if row is None or name in section_names():
        return Problem(key, f"{key} = {found}: expects a table of keys; write [{key}] and its keys below")
    return Problem(key, f"{key} = {found}: expects {row.type}; {_fix(name, _value_of(table, path))}")


def _mend(table: dict[str, Any], path: tuple[str | int, ...], kind: str) -> None:
    """Take out a wrong value; where the schema wants one, put a placeholder in."""
    # Inside a list there is no placeholder that keeps the meaning of the whole: the list goes.
    cut = next((i for i, part in enumerate(path) if isinstance(part, int)), None)
    if cut is not None:
        path = path[:cut]
    *parents, last = path
    node: Any = table
    for part in parents:
        node = node[part]
    row = schema_rows().get(generic(path))
    if kind == "extra_forbidden" or row is None or not row.required or cut is not None:
        node.pop(last, None)
    else:
        node[last] = PLACEHOLDERS[row.type.split(" ")[0]]
    if kind == "missing" and row is None:
        node[last] = {}


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def check_schema(table: dict[str, Any]) -> tuple[Recipe, list[Problem], frozenset[str]]:
    """A recipe from merged tables, what is wrong with single keys, and which keys hold placeholders."""
    work = _copy(table)
    problems: dict[str, Problem] = {}
    while True:
        try:
            recipe = Recipe.model_validate(work)
            break
        except ValidationError as error:
            complaints = error.errors(include_url=False, include_context=False)
        for complaint in complaints:
            kind, path = complaint["type"], complaint["loc"]
            known = path if kind == "extra_forbidden" else _known_part(path)
            kind = (
                "incomplete" if kind == "missing" and known != path else kind
            )  # a list with fewer values than its key
            path = known
            if not touched(path, problems):
                problem = _describe(kind, path, table if kind != "missing" else {})
                problems[problem.key] = problem
            _mend(work, path, kind)
    return recipe, _without_echoes(list(problems.values())), frozenset(_list_root(key) for key in problems)


def touched(path: tuple[str | int, ...], problems: dict[str, Problem]) -> bool:
    """Whether a key at or above this path has been reported already."""
    keys = {".".join(str(part) for part in path[: length + 1]) for length in range(len(path))}
    return bool(keys & set(problems))


def _list_root(key: str) -> str:
    """A key without its part inside a list: the list goes as a whole."""
    parts = key.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:index])


def _without_echoes(problems: list[Problem]) -> list[Problem]:
    """A misspelt required key is one mistake, not an unknown key and a missing one."""
    missing = {problem.key for problem in problems if problem.text.startswith(f"{problem.key}: missing")}
    meant = {key for key in missing if any(problem.text.endswith(NEAREST + key) for problem in problems)}
    return [problem for problem in problems if problem.key not in meant]
