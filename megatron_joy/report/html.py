"""`joy report RUN`: one self-contained HTML page about a run, with no network and no code from elsewhere.

The page forbids itself everything but its own style sheet and script (a Content-Security-Policy with their hashes),
so that what a recipe or an event's message holds stays text.
"""

import base64
import hashlib
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from megatron_joy import __version__
from megatron_joy.data.atomic import write_atomically
from megatron_joy.errors import WorkError
from megatron_joy.report import headline, panels, tables, text
from megatron_joy.report.charts import ChartSpec
from megatron_joy.report.layers import layers
from megatron_joy.report.metrics import Progress
from megatron_joy.report.payload import build_payload, safe_json
from megatron_joy.report.runlog import RunLog, read_run
from megatron_joy.report.schedule import schedule_panel
from megatron_joy.report.summary import RunSummary, summarize

REPORT_NAME = "report.html"
_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("base.js", "chart.js", "report.js")


def write_report(run_folder: str | Path, *, now: float | None = None, progress: Progress | None = None) -> Path:
    """Writes `report.html` into the run's folder and returns its path; the run may go on writing meanwhile.

    Args:
        run_folder: the run's folder.
        now: the present, unix seconds; the clock when None.
        progress: called with (bytes read, bytes to read) of metrics.jsonl.

    Raises:
        UserError: the folder is no run's.
        WorkError: the page cannot be written.
    """
    now = time.time() if now is None else now
    run = read_run(run_folder, now=now, progress=progress)
    return write_page(run, summarize(run), now)


def write_page(run: RunLog, summary: RunSummary, now: float) -> Path:
    """Writes the page of a run that was read; see `write_report`."""
    path = run.folder / REPORT_NAME
    try:
        write_atomically(path, render(run, summary, now).encode())
    except OSError as error:
        raise WorkError(f"{path}: cannot write the report: {error.strerror}") from error
    return path


def render(run: RunLog, summary: RunSummary, now: float) -> str:
    """The page as one string."""
    payload = build_payload(run, summary)
    specs = panels.chart_specs(run, summary)
    if payload["load"] is not None:
        specs.append(panels.balance_spec(payload))
    payload["charts"] = [panels.spec_json(spec) for spec in specs]
    style = _asset("style.css")
    script = "".join(map(_asset, _SCRIPTS))
    page = Template(_asset("template.html"))
    return page.substitute(
        title=escape(f"{run.name} · training report"),
        policy=_policy(style, script),
        style=style,
        script=script,
        data=safe_json(payload),
        name=escape(run.name),
        badge=headline.badge(summary),
        description=escape(summary.description),
        meta=headline.meta_line(summary),
        findings=headline.findings(run, summary),
        cards=headline.cards(summary),
        charts=_charts(run, payload, specs),
        tables=_tables(run, summary, payload),
        written=text.moment(now),
        version=__version__,
    )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text("utf-8")


def _policy(style: str, script: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
    return f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"


def _charts(run: RunLog, payload: dict[str, Any], specs: Sequence[ChartSpec]) -> str:
    drawn = {spec.id: panels.chart_panel(spec, payload) for spec in specs}
    parts = [drawn.pop("loss", ""), panels.timeline_panel(run)] if run.attempts else []
    parts.append(schedule_panel(run.folder, run.attempts[-1].end_step if run.attempts else 0))
    balance = drawn.pop("balance", "")
    parts += drawn.values()
    if payload["sources"] is not None:
        parts.append(panels.composition_panel(payload, run.recipe))
    if run.metrics.load is not None:
        load = run.metrics.load
        parts += [panels.overview_panel(run, load), balance, panels.history_panel(run, load)]
    return "".join(parts)


def _tables(run: RunLog, summary: RunSummary, payload: dict[str, Any]) -> str:
    origin = summary.started or 0.0
    return "".join(
        (
            tables.attempts(run),
            tables.events(run, payload["events"], origin),
            tables.checkpoints(run, payload["checkpoints"], origin),
            tables.numbers(run),
            layers(run.folder),
            tables.reproduce(run, summary),
            tables.recipe(run),
            tables.environment(run),
        )
    )
