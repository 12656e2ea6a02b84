"""From a pipeline's `[[score]]` sections to scorers, their columns and their bounds."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.score.base import Bounds, Scorer
from data_pipeline.score.classifier import ClassifierScorer
from data_pipeline.score.heuristic import HeuristicScorer
from data_pipeline.score.linear import load_linear
from megatron_joy.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.config import Pipeline, ScoreSection

HASHED_BYTES = 64_000_000  # larger files of a model are told apart by size and time alone


def section_columns(section: "ScoreSection") -> tuple[str, ...]:
    """Names of a section's columns: its own name, with `_` and the dimension where there are several."""
    if section.scorer == "heuristic":
        return tuple(f"{section.name}_{column}" for column in HeuristicScorer.columns)
    if section.scorer == "linear":
        return (section.name,)
    return tuple(f"{section.name}_{column}" for column in section.columns)


def column_names(pipeline: "Pipeline") -> tuple[str, ...]:
    """All columns of a pipeline's scores, in order."""
    return tuple(column for section in pipeline.score for column in section_columns(section))


def bounds_of(pipeline: "Pipeline") -> Mapping[str, Bounds]:
    """What a score must reach, by column; the order of the sections is that of the reasons."""
    return {
        column: Bounds(
            least=-float("inf") if bound.least is None else bound.least,
            below=float("inf") if bound.below is None else bound.below,
        )
        for section in pipeline.score
        for column, bound in section.keep.items()
    }


def make_scorer(section: "ScoreSection") -> Scorer:
    """The scorer of a section. Raises UserError for a model that is not there or has other columns."""
    if section.scorer == "heuristic":
        return HeuristicScorer()
    if section.scorer == "endpoint":
        from data_pipeline.score.endpoint import EndpointScorer  # its HTTP client is slow to import

        assert section.url is not None, "the schema asks for it"
        assert section.model is not None, "the schema asks for it"
        return EndpointScorer(section.url, section.model, tuple(section.columns), section.key_variable)
    assert section.folder is not None, "the schema asks for it"
    if section.scorer == "linear":
        return replace(load_linear(Path(section.folder)), name=section.name)
    scorer = ClassifierScorer(section.folder, section.name)
    found = tuple(column.removeprefix(f"{section.name}_") for column in scorer.columns)
    if found != tuple(section.columns):
        raise UserError(
            f"score {section.name}: columns are {', '.join(section.columns)}, but {section.folder} has "
            f"{', '.join(found)}; write columns = {list(found)}"
        )
    return scorer


def check_models(pipeline: "Pipeline") -> None:
    """Raises UserError for a linear model that is not there: that should not come up after all inputs were read."""
    for section in pipeline.score:
        if section.scorer == "linear":
            make_scorer(section)


def model_fingerprint(folder: str | None) -> Any:
    """What of a model's folder its scores depend on; None without one."""
    if folder is None:
        return None
    found = []
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        status = path.stat()
        small = status.st_size <= HASHED_BYTES
        content = hashlib.sha256(path.read_bytes()).hexdigest() if small else status.st_mtime_ns
        found.append([path.relative_to(folder).as_posix(), status.st_size, content])
    return found
