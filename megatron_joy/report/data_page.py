"""`joy data stats DIR --html PAGE`: the ledger of a pipeline as one self-contained page, without scripts.

What was read and what became of it step by step, tokens by source and language, lengths, scores with their bounds,
clusters of near-duplicates, and for every reason a few of the documents that went, so that a person can judge a filter.
"""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import orjson

from megatron_joy.data.atomic import write_atomically
from megatron_joy.data.ledger import SAMPLES_NAME, Ledger, Step, load_ledger
from megatron_joy.data.manifest import Totals
from megatron_joy.errors import UserError, WorkError
from megatron_joy.report import bars, text
from megatron_joy.report.tables import section, table

_ASSETS = Path(__file__).parent / "assets"
_STYLE = """
.sample { border-top: 1px solid var(--rule); padding: 8px 0; }
.sample p { margin: 0 0 4px; color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }
.sample pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; max-height: 12em; }
"""


def write_data_page(folder: Path, page: Path) -> Path:
    """Write the page of a pipeline's output folder. Raises UserError where there is no ledger, or no place for it."""
    if page.exists() and not page.is_file():
        raise UserError(f"--html {page}: is there and no file, expected a page to write; name one, as report.html")
    ledger, samples = load_ledger(folder), read_samples(folder)
    try:
        write_atomically(page, render(ledger, samples).encode())
    except OSError as error:
        raise WorkError(f"{page}: cannot write the report: {error.strerror}") from error
    return page


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The documents that were kept of each reason. Raises UserError for a list that is missing or torn."""
    path = folder / SAMPLES_NAME
    try:
        return [orjson.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, orjson.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run the pipeline again") from None


def render(ledger: Ledger, samples: Sequence[dict[str, Any]]) -> str:
    """The page as one string; samples: rows of `dropped_samples.jsonl`."""
    style = (_ASSETS / "style.css").read_text("utf-8") + _STYLE
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    panels = (
        _funnel(ledger.steps),
        _reasons(ledger.steps),
        _counted(ledger.steps),
        _totals("sources", "Tokens by source", "source", ledger.totals),
        _lengths(ledger.lengths),
        _totals("languages", "Tokens by language", "language", ledger.languages) if ledger.languages else "",
        *_scores(ledger),
        _clusters(ledger.clusters) if ledger.clusters else "",
        _sources(ledger) if len(ledger.sources) > 1 else "",
        *_samples(samples),
    )
    page = Template((_ASSETS / "data_template.html").read_text("utf-8"))
    return page.substitute(
        policy=f"default-src 'none'; style-src 'sha256-{digest}'",
        style=style,
        name=escape(ledger.pipeline),
        description=escape(ledger.description),
        meta=f"settings {ledger.pipeline_sha256[:12]}",
        cards="".join(_cards(ledger)),
        panels="".join(panels),
        version=escape(ledger.code_version),
    )


def _cards(ledger: Ledger) -> Iterator[str]:
    steps = ledger.steps
    tokens = sum(totals.tokens for totals in ledger.splits.values())
    share = steps[-1].documents_out / steps[0].documents_in if steps[0].documents_in else 0.0
    splits = ", ".join(f"{name} {text.count(totals.tokens)}" for name, totals in ledger.splits.items())
    sources = text.plural(len(ledger.sources), "source")
    for label, value, note in (
        ("Records read", text.count(steps[0].documents_in), f"from {sources}"),
        ("Documents kept", text.count(steps[-1].documents_out), f"{share:.1%} of the records"),
        ("Text kept", text.size(steps[-1].bytes_out), f"of {text.size(steps[0].bytes_out)} read"),
        ("Tokens", text.count(tokens), splits),
    ):
        yield (
            f'<div class="card"><h3>{label}</h3><p class="figure">{escape(value)}</p>'
            f'<p class="note">{escape(note)}</p></div>'
        )


def _panel(id: str, title: str, body: str, caption: str = "", wide: bool = False) -> str:
    note = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    kind = "panel wide" if wide else "panel"
    return f'<section class="{kind}" id="{id}"><header><h2>{escape(title)}</h2></header>{body}{note}</section>'


def _funnel(steps: Sequence[Step]) -> str:
    rows = [
        (
            step.name,
            step.documents_out,
            step.documents_in - step.documents_out,
            f"{step.documents_out:,} documents, {text.size(step.bytes_out)}",
        )
        for step in steps
    ]
    caption = "Documents that each step lets through, pale: those that it drops. Every document in is one or the other."
    return _panel("funnel", "What became of every document", bars.funnel(rows), caption, wide=True)


def _reasons(steps: Sequence[Step]) -> str:
    rows = []
    for step in steps:
        for reason, count in step.dropped.items():
            size = step.bytes_dropped.get(reason)
            share = count / step.documents_in if step.documents_in else 0.0
            cells = (escape(step.name), escape(reason), f"{count:,}", f"{share:.2%}", text.size(size))
            rows.append(cells)
        if step.bytes_changed:
            sign = "+" if step.bytes_changed > 0 else "−"
            change = f"{sign}{text.size(abs(step.bytes_changed))}"
            rows.append((escape(step.name), "<i>text of documents that stay</i>", "", "", change))
    if not rows:
        return ""
    head = ("step", "reason", "documents", "of those that it took", "text")
    note = "bytes of records that a reader puts aside are not counted: they are no text"
    return section("reasons", "Why documents went", table(head, rows, numeric=(2, 3, 4)), note=note)


def _counted(steps: Sequence[Step]) -> str:
    """What steps counted by themselves: replacements by kind, lines by reason, languages, items of benchmarks."""
    rows = [
        (escape(step.name), escape(name), f"{count:,}")
        for step in steps
        for name, count in sorted(step.counts.items(), key=lambda item: -item[1])
    ]
    rows += [
        (escape(step.name), "<i>documents that stay with another text</i>", f"{step.documents_changed:,}")
        for step in steps
        if step.documents_changed
    ]
    if not rows:
        return ""
    note = "documents for languages and benchmarks; replacements, characters and lines elsewhere"
    return section("counted", "What steps counted", table(("step", "what", "number"), rows, numeric=(2,)), note=note)


def _totals(id: str, title: str, kind: str, totals: dict[str, Totals]) -> str:
    whole = sum(part.tokens for part in totals.values()) or 1
    rows = [
        (
            escape(name),
            f"{part.documents:,}",
            f"{part.tokens:,}",
            f"{part.tokens / whole:.1%}",
            text.size(part.bytes_text),
            f"{part.bytes_text / part.tokens:.2f}" if part.tokens else text.MISSING,
        )
        for name, part in sorted(totals.items(), key=lambda item: -item[1].tokens)
    ]
    head = (kind, "documents", "tokens", "share", "text", "bytes a token")
    return _panel(id, title, table(head, rows, numeric=(1, 2, 3, 4, 5)))


def _sources(ledger: Ledger) -> str:
    """Documents of each source after each step."""
    head = ["source", "records", *(step.name for step in ledger.steps)]
    rows = [
        [escape(name), f"{steps[0].documents_in:,}", *(f"{step.documents_out:,}" for step in steps)]
        for name, steps in ledger.sources.items()
    ]
    body = table(head, rows, numeric=range(1, len(head)))
    return section("source-steps", "Documents of each source after each step", body)


def _lengths(lengths: Sequence[int]) -> str:
    labels = [(power + 0.0, text.count(2**power)) for power in range(0, len(lengths) + 1, 2)]
    chart = bars.histogram(lengths, labels, "documents by length")
    return _panel("lengths", "Length of documents", chart, "Tokens, in powers of two; every document that was written.")


def _scores(ledger: Ledger) -> Iterator[str]:
    for column, values in ledger.scores.items():
        missing = values.get("nan", 0)
        known = sorted((float(value), count) for value, count in values.items() if value != "nan")
        caption = f"{missing:,} documents without a score." if missing else "Every document has a score."
        chart = '<p class="caption">No document has a score.</p>'
        if known:
            numbers = np.array([value for value, _ in known]), np.array([count for _, count in known])
            counts, low, high = bars.binned(*numbers)
            scale = len(counts) / (high - low)
            labels = [(at * len(counts) / 4, text.general(low + at * (high - low) / 4)) for at in range(5)]
            bounds = zip(("least", "below"), ledger.bounds.get(column, (None, None)), strict=True)
            marks = [
                ((value - low) * scale, f"{name} {value:g}")
                for name, value in bounds
                if value is not None and low <= value <= high
            ]
            chart = bars.histogram(counts, labels, f"scores {column}", marks)
        yield _panel(f"score-{escape(column)}", f"Score {column}", chart, caption)


def _clusters(clusters: dict[str, int]) -> str:
    sizes = sorted((int(size), count) for size, count in clusters.items())
    powers = [0] * (sizes[-1][0].bit_length())
    for size, count in sizes:
        powers[size.bit_length() - 1] += count
    labels = [(power + 0.5, f"{2**power}-{2 ** (power + 1) - 1}" if power else "1") for power in range(len(powers))]
    gone = sum((size - 1) * count for size, count in sizes)
    caption = (
        f"{text.plural(sum(count for _, count in sizes), 'cluster')} by size, in powers of two; the largest has "
        f"{text.plural(sizes[-1][0], 'document')}. One of each stays, {gone:,} go, exact copies included."
    )
    return _panel("clusters", "Clusters of near-duplicates", bars.histogram(powers, labels, "cluster sizes"), caption)


def _samples(samples: Sequence[dict[str, Any]]) -> Iterator[str]:
    reasons: dict[str, list[dict[str, Any]]] = {}
    for row in samples:
        reasons.setdefault(row["reason"], []).append(row)
    for number, (reason, rows) in enumerate(reasons.items()):
        body = "".join(
            f'<div class="sample"><p>{escape(str(row["source"]))} · {escape(str(row["file"]))} at offset '
            f"{row['offset']:,} · {row['characters']:,} characters</p><pre>{escape(row['excerpt'])}</pre></div>"
            for row in rows
        )
        note = f"{text.plural(len(rows), 'document')}, chosen by a hash of the text"
        yield section(f"sample-{number}", f"Dropped: {reason}", body, folded=True, note=note)
