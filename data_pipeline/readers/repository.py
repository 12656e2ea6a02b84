"""A repository as long documents (data_pipeline/code/repository.py); the whole of it is in memory."""

import os
from collections.abc import Iterator

from data_pipeline.chunk import CHARACTERS_PER_TOKEN
from data_pipeline.code.licence import LICENCE_FILE, of_repository
from data_pipeline.code.repository import documents
from data_pipeline.code.signals import Bounds, signals_of, verdict
from data_pipeline.config import SourceSection
from data_pipeline.inventory import InputFile, printable, repository_files, size_of, suffixes_of
from data_pipeline.readers.base import Document, Record, Rejected
from data_pipeline.readers.files import whole_text
from megatron_joy.errors import WorkError


def _read_file(path: str, limit: int) -> tuple[int, bytes | Rejected]:
    """A file's size and its text, or why it is none."""
    try:
        with open(path, "rb") as stream:
            return os.fstat(stream.fileno()).st_size, whole_text(stream, limit)
    except OSError as error:
        return size_of(path), Rejected("unreadable", 0, error.strerror or type(error).__name__)


def _judged(text: str, path: str, source: SourceSection) -> str | None:
    reason = verdict(signals_of(text, path), Bounds()) if source.file_rules else None
    return f"file_{reason}" if reason else None


def read_repository(file: InputFile, source: SourceSection, limit: int) -> Iterator[Record]:
    """The documents of a repository, and each file of it that is in none of them, with its reason.

    Raises WorkError when the repository is not the one that the plan was made for.
    """
    root = os.fsdecode(file.location.encode("latin-1"))
    texts: dict[str, str] = {}
    licences: dict[str, str] = {}
    size = 0
    for full in repository_files(root, suffixes_of(source)):
        path = printable(os.path.relpath(full, root).replace(os.sep, "/"))
        bytes_read, content = _read_file(full, limit)
        size += bytes_read
        if "/" not in path and LICENCE_FILE.match(path) and isinstance(content, bytes):
            licences[path] = content.decode()
            continue
        reason = content.reason if isinstance(content, Rejected) else _judged(content.decode(), path, source)
        if reason is not None or isinstance(content, Rejected):
            yield Rejected(reason or "unreadable", 0, path)
        else:
            texts[path] = content.decode()
    if size != file.size:
        raise WorkError(f"{file.path}: {size} bytes, expected {file.size}: it changed during the run; run again")
    licence = of_repository(licences)
    longest = int(source.document_tokens * CHARACTERS_PER_TOKEN)
    for number, document in enumerate(documents(os.path.basename(root), texts, longest, source.ordered_share)):
        yield Document(document.text.encode(), number, licence)
