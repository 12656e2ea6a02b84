"""Scoring as a stage: `score` (one task for each bucket), after all that drops copies, before the shards are written.

Scores are kept apart from what is dropped by them: with another bound in the pipeline only the writing is done again.
A section with `only_kept` does not look at what earlier sections' bounds drop, for scorers that cost more than writing.
"""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import batched
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.config import Pipeline, ScoreSection
from data_pipeline.engine import Job, TaskResult
from data_pipeline.score.base import Bounds, Scorer, Scores, reasons
from data_pipeline.score.scorers import bounds_of, column_names, make_scorer, model_fingerprint, section_columns
from data_pipeline.select import Losses, remaining, scores_path
from megatron_joy.data.atomic import atomic_file

BATCH = 256  # documents whose text is held at a time


@lru_cache(maxsize=4)
def _scorer(description: str) -> Scorer:
    return make_scorer(ScoreSection.model_validate_json(description))


def score_texts(pipeline: Pipeline, texts: list[str]) -> Scores:
    """float32 [texts, columns]; NaN where a section with only_kept did not look."""
    parts: list[Scores] = [np.zeros((len(texts), 0), dtype=np.float32)]
    bounds: dict[str, Bounds] = {}
    everything = bounds_of(pipeline)
    columns: tuple[str, ...] = ()
    for section in pipeline.score:
        wanted = np.ones(len(texts), dtype=bool)
        if section.only_kept:
            wanted[:] = [reason is None for reason in reasons(columns, np.concatenate(parts, axis=1), bounds)]
        own = np.full((len(texts), len(section_columns(section))), np.nan, dtype=np.float32)
        scorer = _scorer(section.model_dump_json())
        own[wanted] = scorer.score([text for text, looked in zip(texts, wanted.tolist(), strict=True) if looked])
        parts.append(own)
        columns += section_columns(section)
        bounds |= {column: everything[column] for column in section.keep}
    return np.concatenate(parts, axis=1)


def count_values(scores: Scores, columns: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """For each column how often each value occurs, to two significant digits; those of several tasks can be added."""

    def rounded(values: npt.NDArray[np.float32]) -> Iterator[str]:
        return (f"{value:.2g}" for value in values.tolist())

    return {column: dict(sorted(Counter(rounded(scores[:, place])).items())) for place, column in enumerate(columns)}


def score_task(job: Job, shard: int) -> TaskResult:
    """Score what remains of a bucket, in its order."""
    columns = column_names(job.pipeline)
    parts: list[Scores] = [np.zeros((0, len(columns)), dtype=np.float32)]
    for documents in batched(remaining(job, shard, Losses(job)), BATCH):
        parts.append(score_texts(job.pipeline, [document.text.decode() for document in documents]))
    scores = np.concatenate(parts)
    path = scores_path(job, shard)
    with atomic_file(path) as stream:
        np.save(stream, scores, allow_pickle=False)
    return TaskResult([job.describe(path)], {"documents": len(scores), "scores": count_values(scores, columns)})


def score_settings(job: Job) -> Any:
    """What of a pipeline its scores depend on; None when it asks for none."""
    sections = job.pipeline.score
    if not sections:
        return None
    last = max((number for number, section in enumerate(sections) if section.only_kept), default=0)
    found = []
    for number, section in enumerate(sections):
        content = section.model_dump(exclude=set() if number < last else {"keep"})
        found.append([content, model_fingerprint(section.folder)])
    return found


def bound_settings(job: Job) -> Any:
    """What of a pipeline the selection by score depends on, beside the scores."""
    return [[section.name, section.model_dump()["keep"]] for section in job.pipeline.score]
