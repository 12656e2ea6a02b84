"""The read stage: records of one task through its source's transforms into buckets, with accounts that close."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from data_pipeline.engine import Job, OutputFile, TaskResult
from data_pipeline.inventory import InputFile
from data_pipeline.readers.base import Document, Rejected
from data_pipeline.readers.open import read_piece
from data_pipeline.spool import Spooled, SpoolWriter, spool_paths, text_hash, write_index
from data_pipeline.transform.base import Draft
from data_pipeline.transform.chain import Chain, Sampler, content_digest, sections_for
from megatron_joy.data.atomic import atomic_file, write_atomically
from megatron_joy.data.ledger import SAMPLES_NAME

QUARANTINE = "quarantine.jsonl"
Take = Callable[[Spooled], None]


class SourceReader:
    """What one read task does to one source's records, and what it counted.

    records = documents + dropped. `read`: what the reader gave to the transforms; documents, bytes_text: what was left.
    take: gets each document that is left; aside: the file of records that are none.
    """

    def __init__(self, job: Job, name: str, take: Take, aside: BinaryIO, sampler: Sampler) -> None:
        sections = sections_for(job.pipeline.transforms, name)
        self._name, self._take, self._aside, self._sampler = name, take, aside, sampler
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
        self._take(Spooled(digest, number, document.offset, licence, text, document.url, language, document.part))

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


def read_pieces(job: Job, shard: int, take: Take, folder: Path) -> tuple[dict[str, Any], list[OutputFile]]:
    """Read the pieces of one task; `take` gets each document. What is none, and what a transform drops, is counted.

    Returns the statistics, and the files of quarantine and samples that it wrote into `folder`.
    """
    quarantine, samples, sampler = folder / QUARANTINE, folder / SAMPLES_NAME, Sampler()
    with atomic_file(quarantine) as aside:
        sources = [SourceReader(job, source.name, take, aside, sampler) for source in job.pipeline.sources]
        for piece in job.plan.tasks[shard]:
            file = job.plan.inputs[piece.input]
            source = sources[file.source]
            for record in read_piece(job.pipeline, file, piece):
                if isinstance(record, Rejected):
                    source.reject(record, file)
                else:
                    source.accept(record, piece.input, file)
    write_atomically(samples, b"".join(orjson.dumps(row) + b"\n" for row in sampler.rows()))
    names = [source.name for source in job.pipeline.sources]
    statistics = {name: source.statistics() for name, source in zip(names, sources, strict=True)}
    return {"sources": statistics}, [job.describe(quarantine), job.describe(samples)]


def read_tasks(job: Job) -> int:
    """As many as the plan has, unless documents go straight into shards (stream.py)."""
    return len(job.plan.tasks) if job.pipeline.output.shuffle else 0


def read_task(job: Job, shard: int) -> TaskResult:
    """Read the pieces of one task. Documents go into buckets, or groups of them."""
    folder, buckets = job.task_folder("read", shard), job.plan.buckets
    data, index = spool_paths(folder)
    with atomic_file(data) as stream:
        spool = SpoolWriter(stream, buckets.group_of_text, buckets.groups)
        statistics, files = read_pieces(job, shard, spool.add, folder)
        spool.flush()
    write_index(index, spool.index())
    return TaskResult([job.describe_scratch(data), job.describe(index), *files], statistics)


def read_settings(job: Job) -> Any:
    """What of a pipeline the documents depend on: sources, transforms, and the files that these read."""
    pipeline = job.pipeline
    transforms = [
        [section.version, section.model_dump(), section.fingerprint(), content_digest(section.files())]
        for section in pipeline.transforms
    ]
    return [[source.model_dump() for source in pipeline.sources], pipeline.max_document_megabytes, transforms]
