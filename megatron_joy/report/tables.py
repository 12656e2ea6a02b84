"""The tables at the end of a report: attempts, checkpoints, events, numbers, recipe, environment, how to repeat it."""

import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from megatron_joy.report import text
from megatron_joy.report.runlog import RunLog
from megatron_joy.report.summary import RunSummary

_LONG = 12
"""Tables with more rows than this are folded."""
_EVENT_ROWS = 300
_SAMPLE_ROWS = 12
_AGAIN = "run.folder=runs/again"
_OUTCOMES = {
    "finished": "finished",
    "stopped": "stopped on request",
    "failed": "failed",
    "killed": "killed",
    "running": "running",
}
_TOML = re.compile(
    r"(?P<comment>^\s*#.*$)|(?P<table>^\s*\[.*\]\s*$)|(?:^(?P<key>\s*[\w.\"-]+)(?P<is>\s*=\s*)(?P<value>.*)$)",
    re.MULTILINE,
)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table; cells are HTML, columns in `numeric` are set to the right."""
    align = [' class="number"' if i in numeric else "" for i in range(len(head))]
    top = "".join(f"<th{a}>{escape(name)}</th>" for a, name in zip(align, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{a}>{cell}</td>" for a, cell in zip(align, row, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def section(id: str, title: str, body: str, *, folded: bool = False, note: str = "") -> str:
    """A titled block, folded on request; `body` is HTML, `title` and `note` are text."""
    aside = f' <span class="aside">{escape(note)}</span>' if note else ""
    opened = "" if folded else " open"
    return (
        f'<section class="panel wide" id="{id}"><details{opened}><summary><h2>{escape(title)}</h2>{aside}</summary>'
        f"{body}</details></section>"
    )


def attempts(run: RunLog) -> str:
    """One row an attempt."""
    rows = [
        (
            str(a.number),
            f"{a.start_step:,}",
            f"{a.end_step:,}",
            f"{a.lost_steps:,}" if a.lost_steps else text.MISSING,
            f'<span class="badge {a.outcome}">{_OUTCOMES[a.outcome]}</span>',
            text.moment(a.start_time),
            text.duration(a.end_time - a.start_time),
            str(a.world_size or text.MISSING),
            escape(a.layout or text.MISSING),
        )
        for a in run.attempts
    ]
    head = ("Attempt", "From step", "To step", "Run again", "Ended", "Started", "Lasted", "Processes", "Layout")
    body = table(head, rows, numeric=(0, 1, 2, 3, 7)) if rows else "<p>None yet.</p>"
    return section("attempts", "Attempts", body, folded=len(rows) > _LONG, note=text.plural(len(rows), "attempt"))


def checkpoints(run: RunLog, known: list[dict[str, Any]], origin: float) -> str:
    """One row a checkpoint that is or was on disk."""
    states = {"whole": "whole", "incomplete": "not committed, never resumed from", "removed": "since removed"}
    rows = [
        (f"{one['step']:,}", text.moment(origin + one["time"]), text.size(one["bytes"]), states[one["state"]])
        for one in reversed(known)
    ]
    on_disk = sum(one["state"] == "whole" for one in known)
    body = table(("Step", "Written", "Size", "State"), rows, numeric=(0, 2)) if rows else "<p>None was written.</p>"
    return section("checkpoints", "Checkpoints", body, folded=len(rows) > _LONG, note=f"{on_disk} on disk")


def events(run: RunLog, shown: list[dict[str, Any]], origin: float) -> str:
    """The newest events but checkpoints and validations."""
    rows = [
        (text.moment(origin + e["time"]), f"{e['step']:,}", str(e["attempt"]), escape(e["kind"]), escape(e["message"]))
        for e in shown[-_EVENT_ROWS:]
    ]
    head = ("Time", "Step", "Attempt", "Kind", "What")
    body = table(head, rows, numeric=(1, 2)) if rows else "<p>None was noted.</p>"
    note = f"newest {_EVENT_ROWS} of {len(shown):,}" if len(shown) > _EVENT_ROWS else text.plural(len(shown), "event")
    return section("events", "Events", body, folded=len(rows) > _LONG, note=note)


def numbers(run: RunLog) -> str:
    """A dozen rows of the metrics at even distances, validated steps preferred: the curves for readers of numbers."""
    metrics = run.metrics
    if not len(metrics):
        return ""
    pool = np.flatnonzero(np.isfinite(metrics["validation_loss"]))
    pool = pool if len(pool) >= 2 else np.arange(len(metrics))
    pool = np.unique(np.concatenate([[0], pool, [len(metrics) - 1]]))
    places = pool[np.unique(np.linspace(0, len(pool) - 1, _SAMPLE_ROWS).round().astype(int))]
    formats = (
        ("tokens", text.count),
        ("loss", text.loss),
        ("validation_loss", text.loss),
        ("mtp_loss", text.loss),
        ("lr", text.general),
        ("grad_norm", text.general),
        ("tokens_per_second", text.count),
    )
    rows = [[f"{metrics.step[i]:,}", *(show(float(metrics[name][i])) for name, show in formats)] for i in places]
    head = ("Step", "Tokens", "Train", "Validation", "MTP", "Learning rate", "Gradient norm", "Tokens/s")
    body = table(head, rows, numeric=range(8))
    return section("numbers", "Numbers", body, note="at even distances; metrics.jsonl has all")


def recipe(run: RunLog) -> str:
    """recipe.toml with its tables, keys and comments set apart."""
    if not run.recipe_text:
        return ""
    body = f'<pre class="toml">{_coloured(run.recipe_text)}</pre>'
    return section("recipe", "Recipe", body, folded=True, note="recipe.toml, everything that defines this run")


def _coloured(toml: str) -> str:
    def mark(match: re.Match[str]) -> str:
        if match["key"]:
            value = f'<span class="toml-value">{escape(match["value"])}</span>'
            return f'<span class="toml-key">{escape(match["key"])}</span>{escape(match["is"])}{value}'
        kind = "comment" if match["comment"] else "table"
        return f'<span class="toml-{kind}">{escape(match[0])}</span>'

    parts, place = [], 0
    for match in _TOML.finditer(toml):
        parts += [escape(toml[place : match.start()]), mark(match)]
        place = match.end()
    return "".join([*parts, escape(toml[place:])])


def environment(run: RunLog) -> str:
    """environment.json, one row a value."""
    if not run.environment:
        return ""
    rows = [(f"<code>{escape(key)}</code>", escape(value)) for key, value in _flat("", run.environment)]
    return section("environment", "Environment", table(("What", "Value"), rows), folded=True, note="environment.json")


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, list):
        yield prefix, " ".join(map(str, value))
    else:
        yield prefix, "" if value is None else str(value)


def reproduce(run: RunLog, summary: RunSummary) -> str:
    """The commands that repeat this run, go on with it and write this page again."""
    folder = shlex.quote(str(run.folder))
    lines = [
        ("Run it again from its saved recipe, into a new folder", f"joy launch local {folder}/recipe.toml {_AGAIN}"),
        ("Write this page again", f"joy report {folder}"),
    ]
    if summary.status != "finished":
        lines.insert(1, ("Go on where it stands", f"joy launch local {folder}/recipe.toml"))
    said = run.environment.get("command", run.environment.get("argv"))
    if said:
        started = shlex.join(map(str, said)) if isinstance(said, list) else str(said)
        lines.insert(0, ("It was started with", started))
    body = "".join(f"<p>{escape(what)}</p><pre>{escape(command)}</pre>" for what, command in lines)
    note = "same recipe, same data, same code: the same losses"
    return section("reproduce", "How to reproduce", body, note=note)
