"""The read stage: records of one task through its source's transforms into buckets, with accounts that close."""

from collections import Counter
from typing import Any, BinaryIO

import orjson

from data_pipeline.engine import Job, TaskResult
from data_pipeline.inventory import InputFile
from data_pipeline.readers.base import Document, Rejected
from data_pipeline.readers.open import read_piece
from data_pipeline.spool import Spooled, SpoolWriter, spool_paths, text_hash, write_index
from data_pipeline.transform.base import Draft
from data_pipeline.transform.chain import Chain, Sampler, content_digest, sections_for
from megatron_joy.data.atomic import atomic_file, write_atomically
from megatron_joy.data.ledger import SAMPLES_NAME

QUARANTINE = "quarantine.jsonl"


class _SourceReader:
    """What one read task does to one source's records, and what it counted.

    records = documents + dropped. `read`: what the reader gave to the transforms; documents, bytes_text: what was left.
    """

    def __init__(self, job: Job, name: str, spool: SpoolWriter, aside: BinaryIO, sampler: Sampler) -> None:
        sections = sections_for(job.pipeline.transforms, name)
        self._name, self._spool, self._aside, self._sampler = name, spool, aside, sampler
        self._chain = Chain(sections) if sections else None
        self._read = {"documents": 0, "bytes_text": 0}
        self._records = self._documents = self._bytes_text = 0
        self._dropped: Counter[str] = Counter()

    def reject(self, record: Rejected, file: InputFile) -> None:
        """Put a record that is no document aside."""
        self._records += 1
        self._dropped[record.reason] += 1
        place = {"source": self._name, "file": file.path, "offset": record.offset}
        self._aside.write(orjson.dumps({**place, "reason": record.reason, "excerpt": record.excerpt}) + b"\n")

    def accept(self, document: Document, number: int, file: InputFile) -> None:
        """Pass a document on, unless a transform drops it."""
        self._records += 1
        self._read["documents"] += 1
        self._read["bytes_text"] += len(document.text)
        text, language, licence = document.text, None, document.licence or file.licence
        if self._chain is not None:
            draft = Draft(document.text.decode(), document.url, file.path, licence=licence)
            gone = self._chain.apply(draft)
            if gone is not None:
                self._dropped[gone.reason] += 1
                place = {"source": self._name, "file": file.path, "offset": document.offset, "url": document.url}
                self._sampler.add(gone.reason, gone.text, place, self._chain.without_personal_data)
                return
            text, language, licence = draft.text.encode(), draft.language, draft.licence
        self._documents += 1
        self._bytes_text += len(text)
        digest = text_hash(text)
        self._spool.add(Spooled(digest, number, document.offset, licence, text, document.url, language, document.part))

    def statistics(self) -> dict[str, Any]:
        """The accounts."""
        return {
            "records": self._records,
            "read": self._read,
            "documents": self._documents,
            "bytes_text": self._bytes_text,
            "dropped": self._dropped,
            "transforms": [vars(account) for account in self._chain.accounts] if self._chain else [],
        }


def read_task(job: Job, shard: int) -> TaskResult:
    """Read the pieces of one task. Documents go into buckets, or groups of them; what is none, and what a
    transform drops, is counted.
    """
    folder = job.task_folder("read", shard)
    data, index = spool_paths(folder)
    quarantine, samples = folder / QUARANTINE, folder / SAMPLES_NAME
    sampler, buckets = Sampler(), job.plan.buckets
    with atomic_file(data) as stream, atomic_file(quarantine) as aside:
        spool = SpoolWriter(stream, buckets.group_of_text, buckets.groups)
        sources = [_SourceReader(job, source.name, spool, aside, sampler) for source in job.pipeline.sources]
        for piece in job.plan.tasks[shard]:
            file = job.plan.inputs[piece.input]
            source = sources[file.source]
            for record in read_piece(job.pipeline, file, piece):
                if isinstance(record, Rejected):
                    source.reject(record, file)
                else:
                    source.accept(record, piece.input, file)
        spool.flush()
    write_index(index, spool.index())
    write_atomically(samples, b"".join(orjson.dumps(row) + b"\n" for row in sampler.rows()))
    files = [job.describe_scratch(data), *map(job.describe, (index, quarantine, samples))]
    names = [source.name for source in job.pipeline.sources]
    return TaskResult(
        files, {"sources": {name: source.statistics() for name, source in zip(names, sources, strict=True)}}
    )


def read_settings(job: Job) -> Any:
    """What of a pipeline the documents depend on: sources, transforms, and the files that these read."""
    pipeline = job.pipeline
    transforms = [
        [section.version, section.model_dump(), section.fingerprint(), content_digest(section.files())]
        for section in pipeline.transforms
    ]
    return [[source.model_dump() for source in pipeline.sources], pipeline.max_document_megabytes, transforms]
