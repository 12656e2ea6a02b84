"""What happened to one document on its way: its record is read again and goes through the same transforms.

Nothing was logged for it. The pipeline and its plan are in the output folder, the origin beside the shard says where
the record is, and the text's hash says whether what comes out is the document that was written.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.config import Pipeline
from data_pipeline.dedup.lines_stage import NAME
from data_pipeline.engine import PIPELINE, WORK, load_plan
from data_pipeline.inventory import UNSEEN, Piece, compression_of
from data_pipeline.readers.base import Document
from data_pipeline.readers.open import read_piece
from data_pipeline.spool import text_hash
from data_pipeline.transform.base import Draft
from data_pipeline.transform.chain import block_of, sections_for
from megatron_joy.data.provenance import DocumentOrigin
from megatron_joy.errors import UserError, WorkError

SEEKABLE = {"jsonl", "pages"}  # readers that can begin at a record


def load_resolved(folder: Path) -> Pipeline:
    """The pipeline that an output folder was made by. Raises UserError where it isn't kept."""
    path = folder / WORK / PIPELINE
    try:
        return Pipeline.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise UserError(
            f"{path}: cannot be read ({line}); a document's history needs the output folder as it was"
        ) from None


def _records(pipeline: Pipeline, folder: Path, origin: DocumentOrigin) -> Iterator[tuple[Document, str | None]]:
    """The documents of a record, and the licence that its file has; several where a record is cut."""
    names = [source.name for source in pipeline.sources]
    plan = load_plan(pipeline.model_copy(update={"output": pipeline.output.model_copy(update={"folder": str(folder)})}))
    for number, file in enumerate(plan.inputs):
        if names[file.source] == origin.source and file.path == origin.file:
            seekable = pipeline.sources[file.source].reader in SEEKABLE and compression_of(file.path) is None
            piece = Piece(number, origin.offset if seekable else 0, None)
            # Whether it was only touched, the text's hash says.
            for record in read_piece(pipeline, replace(file, modified_ns=UNSEEN), piece):
                if isinstance(record, Document) and record.offset == origin.offset:
                    yield record, file.licence
                elif record.offset > origin.offset and seekable:
                    return


def _is_cut(text: str, before: str) -> bool:
    """Whether a text is another one without some of its lines."""
    lines = iter(before.split("\n"))
    return all(line in lines for line in text.split("\n"))


def history(folder: Path, origin: DocumentOrigin, text: str) -> list[dict[str, Any]]:
    """The steps of a document: step, bytes (of its text after it), changed.

    Raises UserError when the input is not there any more, or something else comes out of it than was written.

    Args:
        folder: the pipeline's output folder.
        origin: the document's.
        text: that was written.
    """
    pipeline = load_resolved(folder)
    sections = sections_for(pipeline.transforms, origin.source)
    try:
        for record, licence in _records(pipeline, folder, origin):
            steps = [{"step": "read", "bytes": len(record.text), "changed": False}]
            draft = Draft(record.text.decode(), record.url, origin.file, licence=record.licence or licence)
            for section in sections:
                before = draft.text
                if block_of(section).apply(draft, Counter()) is not None:
                    break
                steps.append(
                    {"step": section.label, "bytes": len(draft.text.encode()), "changed": draft.text != before}
                )
            if text_hash(draft.text.encode()).hex() == origin.blake3:
                return steps
            if pipeline.repeated_lines.enabled and _is_cut(text, draft.text):
                return [*steps, {"step": NAME, "bytes": len(text.encode()), "changed": True}]
    except WorkError as error:
        raise UserError(str(error)) from None
    raise UserError(
        f"{origin.file}: its record at offset {origin.offset} is gone or gives another text now; "
        "the document's history needs the inputs as they were"
    )
