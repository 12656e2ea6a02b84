"""`joy data`: from text to shards; verify them, count them, look at a document, trace a step."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_pipeline.run import EXECUTORS, Outcome, available_cpus, run_pipeline, serve_as_rank
from data_pipeline.slurm import Scripts, plain_script
from megatron_joy.cli.tables import console as wide_console
from megatron_joy.data.inspect import SetReport, document_report, report_set
from megatron_joy.data.ledger import LEDGER_NAME, Step, load_ledger
from megatron_joy.data.manifest import load_manifest
from megatron_joy.data.provenance import DocumentOrigin
from megatron_joy.data.verify import Verification, shard_sets, verify
from megatron_joy.errors import UserError

app = typer.Typer(help="From text to shards; verify, count, inspect and trace them. Example: joy data run demo")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A shard set, or the folder with train and validation.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
SITE = "JOY_SITE"
EXECUTOR_NAMES = "|".join(EXECUTORS)
# Control characters but for tabs and line ends, and those that turn the direction of writing.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
MOST_COUNTS = 8  # lines that a step's own counts take in a terminal


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


class _StageBars:
    """A bar for each stage of a run on a terminal; elsewhere one line as a stage ends."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}

    def __call__(self, purpose: str, done: int, total: int) -> None:
        if self._progress is None:
            if done == total:
                print(f"{purpose}: {total} of {total} tasks", file=sys.stderr, flush=True)
            return
        if purpose not in self._bars:
            self._bars[purpose] = self._progress.add_task(purpose, total=total)
        self._progress.update(self._bars[purpose], completed=done)


@contextmanager
def _stage_bars() -> Iterator[_StageBars]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _StageBars(None)
        return
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield _StageBars(progress)


@app.command("run", epilog="Example: joy data run demo output.folder=data/demo --workers 2")
def run_command(
    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE", help="A pipeline's TOML or a shipped name.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE ...", help="seed=7")] = None,
    executor: Annotated[str, typer.Option(metavar=EXECUTOR_NAMES, help="What starts the workers.")] = "local",
    workers: Annotated[int | None, typer.Option(help="Processes; default: this machine's cores.")] = None,
    site: Annotated[
        Path | None, typer.Option(help="--executor slurm: the site file (docs/launch.md); default: JOY_SITE's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a pipeline, or go on where a killed run stopped. Whatever the workers, the shards have the same bytes."""
    if site is not None and executor != "slurm":
        raise UserError(f"--site {site}: has no effect with --executor {executor}; remove it")
    if executor == "mpi" and serve_as_rank(pipeline, overrides or ()):
        return
    with _stage_bars() as bars:
        outcome = run_pipeline(pipeline, overrides or (), executor, workers, bars, _scripts(executor, site))
    for note in outcome.notes:
        print(f"note: {note}", file=sys.stderr)
    folder = outcome.pipeline.folder
    reports = [report_set(path) for path in shard_sets(folder)]
    if as_json:
        done = {"folder": str(folder), "tasks_done": outcome.tasks_done, "tasks_kept": outcome.tasks_kept}
        _print_json({**done, "notes": outcome.notes, "sets": [asdict(report) for report in reports]})
        return
    _print_reports(reports)
    print(_closing_line(outcome))


def _scripts(executor: str, site: Path | None) -> Scripts:
    """What is submitted under Slurm, filled in from the site file. Raises UserError for a mistake in it."""
    site = site or (Path(os.environ[SITE]) if os.environ.get(SITE) else None)
    if executor != "slurm" or site is None:
        return plain_script
    from launch.slurm_site import data_script, load_site

    return partial(data_script, load_site(site))


def _closing_line(outcome: Outcome) -> str:
    kept = f", {outcome.tasks_kept} kept from an earlier run" if outcome.tasks_kept else ""
    quarantine = outcome.pipeline.folder / "quarantine.jsonl"
    return f"{outcome.tasks_done} tasks done{kept}; what was put aside is listed in {quarantine}"


@app.command("verify", epilog="Example: joy data verify data/demo")
def verify_command(folder: Folder, as_json: Json = False) -> None:
    """Check every count, checksum, size, pointer and token of a shard set; all problems are named."""
    results = [_verify_with_progress(path) for path in shard_sets(folder)]
    problems = [problem for result in results for problem in result.problems]
    if as_json:
        _print_json([asdict(result) for result in results])
    for result in results:
        if not result.problems and not as_json:
            amounts = f"{result.shards} shards, {result.documents} documents, {result.tokens} tokens"
            print(f"{result.folder}: whole: {amounts}, {result.bytes_read} bytes checked")
    if problems:
        raise UserError("\n".join(map(str, problems)))


def _verify_with_progress(folder: Path) -> Verification:
    console = Console(stderr=True)
    if not console.is_terminal:
        return verify(folder, available_cpus())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(str(folder), total=len(load_manifest(folder).shards))
        return verify(folder, available_cpus(), lambda entry: progress.advance(bar))


@app.command("stats", epilog="Example: joy data stats data/demo --html data/demo/report.html")
def stats_command(
    folder: Folder,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="PAGE", help="Write a page with charts and samples of what went.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a shard set holds and what became of every record that was read."""
    if page is not None:
        from megatron_joy.report.data_page import write_data_page

        print(f"report: {write_data_page(folder, page)}", file=sys.stderr)
    reports = [report_set(path) for path in shard_sets(folder)]
    if as_json:
        _print_json([asdict(report) for report in reports])
        return
    if (folder / LEDGER_NAME).is_file():
        wide_console().print(_steps(load_ledger(folder).steps))
    _print_reports(reports)


def _steps(steps: list[Step]) -> Table:
    """What each step of a pipeline let through, and why the rest went."""
    table = Table(title="step by step", title_justify="left", box=SIMPLE_HEAD)
    for name in ("step", "", "documents", "MB of text"):
        table.add_column(name, justify="right" if name[:1] in "dM" and name else "left")
    for step in steps:
        taken = "" if step.bytes_in is None else _megabytes(step.bytes_in)
        table.add_row(step.name, "takes", f"{step.documents_in:,}", taken)
        for reason, count in step.dropped.items():
            size = step.bytes_dropped.get(reason)
            table.add_row("", f"- {reason}", f"{count:,}", "" if size is None else _megabytes(size))
        if step.documents_changed:
            table.add_row("", "changes", f"{step.documents_changed:,}", f"{step.bytes_changed / 1e6:+,.3f}")
        table.add_row("", "lets through", f"{step.documents_out:,}", _megabytes(step.bytes_out), style="bold")
        for line in _counted(step):
            table.add_row("", line, "", "", style="dim")
    return table


def _counted(step: Step) -> Iterator[str]:
    """What a step counted by itself, the most frequent first; few lines, since there are 176 languages."""
    counts = sorted(step.counts.items(), key=lambda item: -item[1])
    for name, count in counts[:MOST_COUNTS]:
        yield f"  {escape(name)}: {count:,}"
    if len(counts) > MOST_COUNTS:
        yield f"  and {len(counts) - MOST_COUNTS} more in {LEDGER_NAME}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}" if size >= 10_000_000 else f"{size / 1e6:.3f}"


def _print_reports(reports: list[SetReport]) -> None:
    console = wide_console()
    accounts = Table(title="what became of every record", title_justify="left", box=SIMPLE_HEAD)
    accounts.add_column("")
    for report in reports:
        accounts.add_column(report.split, justify="right")
    accounts.add_row("records read", *(f"{report.documents_in:,}" for report in reports))
    for reason in sorted({reason for report in reports for reason in report.dropped}):
        accounts.add_row(f"- {reason}", *(f"{report.dropped.get(reason, 0):,}" for report in reports))
    accounts.add_row("= documents in the set", *(f"{report.documents:,}" for report in reports), style="bold")
    console.print(accounts)
    for report in reports:
        console.print(_contents(report))


def _contents(report: SetReport) -> Table:
    """What is in one set, by source."""
    entropy = "" if report.unigram_entropy is None else f"; unigram entropy {report.unigram_entropy:.3f} nats/token"
    shards = f"{report.shards} shards of {report.dtype}, vocabulary {report.vocab_size}{entropy}"
    lengths = f"documents have {report.median_tokens:,} tokens in the median, {report.longest_tokens:,} at most"
    table = Table(title=escape(report.folder), title_justify="left", box=SIMPLE_HEAD, caption=f"{shards}\n{lengths}")
    table.caption_justify = "left"
    for name in ("source", "documents", "tokens", "MB of text", "bytes/token"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for name, part in report.sources.items():
        table.add_row(escape(name), *_amounts(part))
    whole = {"documents": report.documents, "tokens": report.tokens, "bytes_text": report.bytes_text}
    table.add_row("all", *_amounts(whole), style="bold")
    return table


def _amounts(part: dict[str, int]) -> tuple[str, str, str, str]:
    ratio = part["bytes_text"] / part["tokens"] if part["tokens"] else 0.0
    return f"{part['documents']:,}", f"{part['tokens']:,}", _megabytes(part["bytes_text"]), f"{ratio:.2f}"


@app.command("inspect", epilog="Example: joy data inspect data/demo/validation --doc 3")
def inspect_command(
    folder: Folder,
    doc: Annotated[int, typer.Option(help="Number of the document in the set, from 0.")],
    as_json: Json = False,
) -> None:
    """Show a document as text and tokens, where it is from, and what each step of the pipeline made of it."""
    sets = shard_sets(folder)
    if len(sets) > 1:
        raise UserError(f"{folder}: holds {len(sets)} shard sets; name one, as {sets[0]}")
    report = document_report(sets[0], doc)
    report |= _history(sets[0].parent, report["origin"], report["text"])
    if as_json:
        _print_json(report)
        return
    origin = report["origin"] or {}
    print(f"document {doc}: {report['shard']} document {report['document']}, {len(report['tokens'])} tokens")
    for key, value in origin.items():
        if value is not None:
            print(f"{key + ':':<12}{_shown(str(value))}")
    for step in report["history"] or ():
        change = ", changed by it" if step["changed"] else ""
        print(f"{'after:':<12}{step['step']}, {step['bytes']:,} bytes{change}")
    for column, value in (report["scores"] or {}).items():
        print(f"{'score:':<12}{column} {'missing' if value is None else f'{value:.4g}'}")
    if report["history_missing"]:
        print(f"note: {report['history_missing']}", file=sys.stderr)
    print(f"\n{_shown(report['text'])}\n\n{' '.join(map(str, report['tokens']))}")


def _shown(text: str) -> str:
    """A document's text with what would steer a terminal written out: pages of a crawl may hold anything."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _history(folder: Path, origin: dict[str, Any] | None, text: str) -> dict[str, Any]:
    """A document's steps through the pipeline, or why they cannot be told: its inputs may be gone."""
    if origin is None:
        return {"history": None, "history_missing": "the shard does not say where its documents are from"}
    from data_pipeline.history import history

    try:
        written = text.encode()[: origin["bytes_text"]].decode(errors="replace")  # without the end-of-document token
        return {"history": history(folder, DocumentOrigin(**origin), written), "history_missing": None}
    except UserError as error:
        return {"history": None, "history_missing": str(error)}


@app.command("trace", epilog="Example: joy data trace runs/joyai_tiny --step 12 --rank 0")
def trace_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    step: Annotated[int, typer.Option(help="Step, from 1, as in metrics.jsonl.")],
    rank: Annotated[int | None, typer.Option(help="Data-parallel rank; default: all.")] = None,
    as_json: Json = False,
) -> None:
    """The documents that a step of a run was trained on, from the sample order alone: nothing was logged for it."""
    from megatron_joy.data.trace import render_trace, trace

    rows = trace(run, step, rank)
    if as_json:
        _print_json(rows)
    else:
        wide_console().print(render_trace(rows))
