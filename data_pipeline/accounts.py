"""From what every task counted to the ledger: step by step what became of each source's documents."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from data_pipeline.dedup.lines_stage import NAME
from data_pipeline.engine import Job, statistics_of
from data_pipeline.score.scorers import bounds_of
from data_pipeline.select import CONTAMINATED, EXACT, NEAR
from megatron_joy import __version__
from megatron_joy.data.ledger import Ledger, Step
from megatron_joy.data.manifest import Totals
from megatron_joy.errors import UserError

Statistics = list[dict[str, Any]]


def refuse_empty_splits(job: Job, documents: Counter[str], reads: Callable[[], Statistics]) -> None:
    """Raises UserError for a corpus that leaves a split empty. documents: by split; reads: for the reasons."""
    if not documents.total():
        dropped: Counter[str] = Counter()
        for task in reads():
            for source in task["sources"].values():
                dropped.update(source["dropped"])
        reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(dropped.items())) or "no records"
        raise UserError(f"pipeline {job.pipeline.name}: empty corpus, no record is a document ({reasons})")
    for split, share in (("train", 1 - job.plan.buckets.validation_share), ("validation", 1.0)):
        if not documents[split] and share and (split == "train" or job.plan.buckets.validation):
            raise UserError(
                f"output.validation_share = {job.plan.buckets.validation_share}: leaves {split} empty with "
                f"{documents.total()} documents; change it or give more documents"
            )


def _read_step(parts: Statistics) -> Step:
    """parts: what each read task says of one source."""
    dropped: Counter[str] = Counter()
    for part in parts:
        # A transform's reason has the transform's name before a dot, a reader's has none.
        dropped.update({reason: count for reason, count in part["dropped"].items() if "." not in reason})
    return Step(
        name="read",
        documents_in=sum(part["read"]["documents"] for part in parts) + dropped.total(),
        documents_out=sum(part["read"]["documents"] for part in parts),
        dropped=dict(sorted(dropped.items())),
        bytes_out=sum(part["read"]["bytes_text"] for part in parts),
    )


def _transform_step(name: str, before: Step, parts: Statistics) -> Step:
    """parts: what each read task says of one transform of one source; none where it is not for this source."""
    dropped, sizes, counts = Counter[str](), Counter[str](), Counter[str]()
    for part in parts:
        dropped.update(part["dropped"])
        sizes.update(part["bytes_dropped"])
        counts.update(part["counts"])
    changed = sum(part["bytes_out"] - part["bytes_kept"] for part in parts)
    documents = sum(part["changed"] for part in parts)
    return _following(name, before, dropped, sizes, changed).model_copy(
        update={"documents_changed": documents, "counts": dict(sorted((+counts).items()))}
    )


def _following(name: str, before: Step, dropped: Counter[str], sizes: Counter[str], changed: int = 0) -> Step:
    return Step(
        name=name,
        documents_in=before.documents_out,
        documents_out=before.documents_out - dropped.total(),
        dropped=dict(sorted(dropped.items())),
        bytes_in=before.bytes_out,
        bytes_out=before.bytes_out - sizes.total() + changed,
        bytes_changed=changed,
        bytes_dropped=dict(sorted(sizes.items())),
    )


def _selections(job: Job) -> list[tuple[str, Any]]:
    """The steps after reading: name, and whether a reason is one of theirs."""
    if not job.pipeline.output.shuffle:
        return []
    found: list[tuple[str, Any]] = [("deduplicate", lambda reason: reason in (EXACT, NEAR))]
    if job.pipeline.decontaminate.enabled:
        found.append(("decontaminate", lambda reason: reason == CONTAMINATED))
    if job.pipeline.score:
        found.append(("score", lambda reason: reason.startswith("score_")))
    if job.pipeline.repeated_lines.enabled:
        found.append((NAME, lambda reason: reason == NAME))
    return found


def _steps(job: Job, source: str, reads: Statistics, writes: Statistics) -> list[Step]:
    parts = [task["sources"][source] for task in reads]
    steps = [_read_step(parts)]
    for section in job.pipeline.transforms:
        own = [account for part in parts for account in part["transforms"] if account["name"] == section.label]
        steps.append(_transform_step(section.label, steps[-1], own))
    for name, belongs in _selections(job):
        dropped, sizes = Counter[str](), Counter[str]()
        for task in writes:
            dropped.update(
                {reason: n[source] for reason, n in task["dropped"].items() if belongs(reason) and source in n}
            )
            sizes.update(
                {reason: n[source] for reason, n in task["dropped_bytes"].items() if belongs(reason) and source in n}
            )
        cut = Counter[str]()
        for task in writes if name == NAME else ():
            cut.update(task["repeated_lines"].get(source, {}))
        steps.append(_following(name, steps[-1], +dropped, +sizes, -cut["bytes"]))
        counts = {"lines": cut["lines"]} if cut else {}
        if name == "decontaminate":
            counts = statistics_of(job, "contamination", 1)[0]["removed"].get(source, {})
        steps[-1] = steps[-1].model_copy(update={"documents_changed": cut["documents"], "counts": counts})
    return steps


def _totals(parts: Iterable[dict[str, int]]) -> Totals:
    found = list(parts)
    return Totals(**{key: sum(part[key] for part in found) for key in Totals.model_fields})


def _by_name(tables: list[dict[str, dict[str, int]]]) -> dict[str, Totals]:
    names = sorted({name for table in tables for name in table})
    return {name: _totals(table[name] for table in tables if name in table) for name in names}


def _lengths(writes: Statistics) -> list[int]:
    found: Counter[int] = Counter()
    for task in writes:
        found.update(dict(enumerate(task.get("lengths", []))))
    return [found[power] for power in range(max(found, default=-1) + 1)]


def _scores(job: Job) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    tasks = statistics_of(job, "score", job.plan.buckets.total) if job.pipeline.score else []
    for task in tasks:
        for column, values in task["scores"].items():
            found.setdefault(column, Counter()).update(values)
    return {column: dict(sorted(values.items())) for column, values in found.items()}


def make_ledger(job: Job, reads: Statistics, writes: Statistics) -> Ledger:
    """The ledger of a job whose tasks are done. Raises pydantic's ValidationError where something does not add up."""
    names = [source.name for source in job.pipeline.sources]
    written = _by_name([task["sources"] for task in writes])
    nothing = Totals(documents=0, tokens=0, bytes_text=0)
    clusters: dict[str, Any] = {}
    if job.pipeline.near_duplicates.enabled:
        clusters = statistics_of(job, "cluster", 1)[0]["clusters_by_size"]
    languages = _by_name([task["languages"] for task in writes])
    return Ledger(
        pipeline=job.pipeline.name,
        description=job.pipeline.description,
        pipeline_sha256=job.plan.pipeline_sha256,
        code_version=__version__,
        sources={name: _steps(job, name, reads, writes) for name in names},
        splits=_by_name([{task["split"]: _totals(task["sources"].values()).model_dump()} for task in writes]),
        totals={name: written.get(name, nothing) for name in names},
        languages=languages if set(languages) - {"unknown"} else {},
        lengths=_lengths(writes),
        scores=_scores(job),
        bounds={
            column: (
                None if bound.least == -float("inf") else bound.least,
                None if bound.below == float("inf") else bound.below,
            )
            for column, bound in bounds_of(job.pipeline).items()
        },
        clusters=clusters,
    )
