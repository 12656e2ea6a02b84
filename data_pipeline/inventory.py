"""What a pipeline reads: files found in a fixed order, cut into pieces, pieces packed into read tasks.

The result depends on the files and the pipeline alone, never on the number of workers.
"""

import glob
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from data_pipeline.code.licence import LICENCE_FILE
from data_pipeline.config import Pipeline, SourceSection
from data_pipeline.environment import environment_files
from megatron_joy.errors import UserError

MEGABYTE = 1_000_000
# How much text a byte is taken for when work is divided: of compressed files, and of formats that hold more than text.
COMPRESSED = {".gz": 4.0, ".zst": 4.0}
DENSITY = {"parquet": 2.5, "warc": 0.15}
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text", ".markdown")
CODE_SUFFIXES = (
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala", ".go", ".rs"),
    *(".js", ".jsx", ".ts", ".tsx", ".rb", ".php", ".swift", ".lua", ".pl", ".r", ".jl", ".hs", ".ml", ".sh", ".sql"),
    *(".cs", ".m", ".f90", ".el", ".clj", ".ex", ".exs", ".cmake", ".md", ".rst"),
)
DEFAULT_SUFFIXES = {
    "jsonl": JSONL_SUFFIXES,
    "pages": JSONL_SUFFIXES,
    "text": TEXT_SUFFIXES,
    "markdown": (".md", ".markdown", ".mdx"),
    "code": CODE_SUFFIXES,
    "repository": CODE_SUFFIXES,
    "parquet": (".parquet",),
    "warc": (".warc", ".warc.gz", ".warc.zst"),
}
SKIPPED_FOLDERS = {"__pycache__", "node_modules"}
UNSEEN = -1  # time of an input that the system did not let us look at
# What a run writes into its output folder, which is never an input of its own.
WRITTEN = (
    *("train", "validation", "tokenizer", "work", "signatures"),
    *("quarantine.jsonl", "ledger.json", "dropped_samples.jsonl", "decontaminated.jsonl"),
)


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input. path is what reports call it; location is its path's bytes as Latin-1 (any file name survives).

    modified_ns: UNSEEN, with a size of 0, where the system did not say.
    """

    source: int
    path: str
    location: str
    size: int
    modified_ns: int
    licence: str | None


@dataclass(frozen=True, slots=True)
class Piece:
    """The records of an input that start in [start, end); end is None for all the rest."""

    input: int
    start: int
    end: int | None


def printable(path: str) -> str:
    """A path that can be written as UTF-8, whatever bytes its name holds."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _input(source: int, path: str, display: str, licence: str | None) -> InputFile:
    location = os.fsencode(os.path.abspath(path)).decode("latin-1")
    try:
        status = os.stat(path)
    except OSError:  # its reader will say why
        return InputFile(source, printable(display), location, 0, UNSEEN, licence)
    return InputFile(source, printable(display), location, status.st_size, status.st_mtime_ns, licence)


def _is_plain(path: str) -> bool:
    """Whether a path is a file and no link, or one that the system does not let us look at: its reader says so then."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except PermissionError:
        return True
    except OSError:
        return False


def _walk(folder: str, suffixes: tuple[str, ...], own: frozenset[str] = frozenset()) -> Iterator[str]:
    """Files of a tree by suffix, in order, then folders that cannot be listed, so that their reader says so.

    Links are not followed: a foreign tree must not lead out of itself. own: real paths that are passed over.
    """
    closed: list[str] = []
    real = os.path.realpath(folder)
    for parent, folders, files in os.walk(folder, onerror=lambda error: closed.append(error.filename)):
        place = os.path.normpath(os.path.join(real, os.path.relpath(parent, folder)))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in SKIPPED_FOLDERS and os.path.join(place, name) not in own
        )
        for name in sorted(files):
            path = os.path.join(parent, name)
            if name.lower().endswith(suffixes) and os.path.join(place, name) not in own and _is_plain(path):
                yield path
    yield from sorted(closed)


def _is_own(path: str, own: frozenset[str]) -> bool:
    real = os.path.realpath(path)
    return any(real == name or real.startswith(name + os.sep) for name in own)


def expand(pattern: str, suffixes: tuple[str, ...], own: frozenset[str] = frozenset()) -> Iterator[str]:
    """The files that a path or a glob stands for, in order; of folders those with these endings, at any depth.

    own: real paths of files and folders that are passed over, with all below them.
    """
    many = glob.has_magic(pattern)
    for path in sorted(glob.glob(pattern, recursive=True)) if many else [pattern]:
        if own and _is_own(path, own):
            continue
        if os.path.isdir(path):
            yield from _walk(path, suffixes, own)
        elif os.path.isfile(path) or _is_plain(path) or (many and _leads_nowhere(path)):
            yield path


def _leads_nowhere(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _nothing_at(pattern: str, suffixes: tuple[str, ...], own: frozenset[str]) -> str:
    """Why a pattern stands for no file."""
    if own and next(expand(pattern, suffixes), None) is not None:
        return "matches no file but what this pipeline wrote itself"
    if _leads_nowhere(pattern):
        return f"matches no file: it is a link to {printable(os.readlink(pattern))}, which is not there"
    if os.path.exists(pattern) and not os.path.isdir(pattern):
        return "matches no file: it is a pipe or a device"
    if not glob.has_magic(pattern) and not os.path.exists(pattern):
        return "matches no file: it is not there"
    return f"matches no file (endings looked for in folders: {' '.join(suffixes[:8])})"


def repository_files(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    """What is read of a repository: its files by suffix, and the licences at its root."""
    try:
        names = os.listdir(folder)
    except OSError:  # the walk says so
        names = []
    licences = (os.path.join(folder, name) for name in names if LICENCE_FILE.match(name))
    plain = (path for path in licences if os.path.isfile(path) and not os.path.islink(path))
    return sorted({*_walk(folder, suffixes), *plain})


def size_of(path: str) -> int:
    """Bytes of a file, whether it can be read or not; 0 for what cannot be looked at or is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _repository(number: int, folder: str, source: SourceSection) -> InputFile:
    found = _input(number, folder, folder, source.licence)
    paths = repository_files(folder, suffixes_of(source))
    parts = [_input(number, path, path, None) for path in paths]
    return replace(
        found,
        size=sum(map(size_of, paths)),
        modified_ns=max((part.modified_ns for part in parts), default=0),
    )


def _repositories_of(number: int, source: SourceSection) -> list[InputFile]:
    """Each folder that a path or a glob stands for is a repository."""
    folders: dict[str, None] = {}
    for pattern in source.paths:
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        kept = [path for path in found if os.path.isdir(path) and not os.path.islink(path)]
        if not kept:
            raise UserError(
                f"sources.{number}.paths: {pattern} matches no folder; give a repository, or a glob of them"
            )
        folders |= dict.fromkeys(kept)
    return [_repository(number, folder, source) for folder in folders]


def suffixes_of(source: SourceSection) -> tuple[str, ...]:
    """The endings of the files that are looked for in a source's folders."""
    return tuple(suffix.lower() for suffix in source.suffixes) or DEFAULT_SUFFIXES[source.reader]


def _files_of(number: int, source: SourceSection, own: frozenset[str]) -> list[InputFile]:
    if source.reader == "python_environment":
        return [
            _input(number, file.location, file.path, file.licence or source.licence)
            for file in environment_files(source.part)
        ]
    if source.reader == "repository":
        return _repositories_of(number, source)
    suffixes = suffixes_of(source)
    paths: dict[str, str] = {}  # by where a file really lies: however it is spelled, it is read once
    folders: dict[str, str] = {}
    for pattern in source.paths:
        path = None
        for path in expand(pattern, suffixes, own):
            paths.setdefault(_real(path, folders), path)
        if path is None:
            raise UserError(
                f"sources.{number}.paths: {pattern} {_nothing_at(pattern, suffixes, own)}; give a file, a folder or a "
                "glob that exists"
            )
    return [_input(number, path, path, source.licence) for path in paths.values()]


def _real(path: str, folders: dict[str, str]) -> str:
    """Where a file lies when no link is on the way. folders: what is known of folders already."""
    if os.path.islink(path):
        return os.path.realpath(path)
    parent, name = os.path.split(path)
    if parent not in folders:
        folders[parent] = os.path.realpath(parent)
    return os.path.join(folders[parent], name)


def compression_of(path: str) -> str | None:
    """The ending that says how a file is compressed, None for a plain file. Case doesn't matter, as in folders."""
    ending = os.path.splitext(path)[1].lower()
    return ending if ending in COMPRESSED else None


def text_per_byte(path: str, reader: str) -> float:
    """How much text a byte of a file is taken for."""
    return COMPRESSED.get(compression_of(path) or "", 1.0) * DENSITY.get(reader, 1.0)


def _can_be_cut(path: str, reader: str) -> bool:
    """Whether a record can be found from any place in the file."""
    compression = compression_of(path)
    return (
        (reader in ("jsonl", "pages") and compression is None)
        or reader == "parquet"
        or (reader == "warc" and compression == ".gz")
    )


def _cut(number: int, file: InputFile, reader: str, target: int) -> Iterator[tuple[Piece, int]]:
    """The pieces of one input, of at most about `target` bytes of text, with their estimated text."""
    ratio = text_per_byte(file.path, reader)
    step = max(1, int(target / ratio))
    if not _can_be_cut(file.path, reader) or file.size <= step:
        yield Piece(number, 0, None), max(int(file.size * ratio), min(1, file.size))
        return
    for start in range(0, file.size, step):
        end = min(start + step, file.size)
        yield Piece(number, start, end), max(1, int((end - start) * ratio))


def _capped(pieces: list[tuple[Piece, int]], files: list[InputFile], limit: float | None) -> list[tuple[Piece, int]]:
    """A sample of the pieces up to a size, chosen by a hash of their names; at least one piece."""
    if limit is None:
        return pieces

    def key(item: tuple[Piece, int]) -> bytes:
        return hashlib.sha256(f"{item[0].start} {files[item[0].input].path}".encode()).digest()

    chosen: set[Piece] = set()
    room = int(limit * MEGABYTE)
    for piece, size in sorted(pieces, key=key):
        if size <= room or not chosen:
            chosen.add(piece)
            room -= size
    return [item for item in pieces if item[0] in chosen]


def _used(
    pieces: list[tuple[Piece, int]], files: list[InputFile], first: int
) -> tuple[list[tuple[Piece, int]], list[InputFile]]:
    """Only the files that have pieces, numbered from `first`."""
    numbers: dict[int, int] = {}
    for piece, _ in pieces:
        numbers.setdefault(piece.input, first + len(numbers))
    renumbered = [(replace(piece, input=numbers[piece.input]), size) for piece, size in pieces]
    return renumbered, [files[number] for number in numbers]


def _pack(pieces: Iterable[tuple[Piece, int]], target: int) -> list[list[Piece]]:
    """Neighbouring pieces together, up to about the target size."""
    tasks: list[list[Piece]] = []
    room = 0
    for piece, size in pieces:
        if not tasks or size > room:
            tasks.append([])
            room = target
        tasks[-1].append(piece)
        room -= size
    return tasks


@dataclass(frozen=True)
class Inventory:
    """Every input, the pieces of each read task, and the estimated text in bytes."""

    inputs: list[InputFile]
    tasks: list[list[Piece]]
    text_bytes: int


def take_inventory(pipeline: Pipeline) -> Inventory:
    """Find the inputs of a pipeline. Raises UserError when a path matches nothing or nothing is there at all."""
    target = int(pipeline.output.shard_megabytes * MEGABYTE)
    written = frozenset(os.path.join(os.path.realpath(pipeline.folder), name) for name in WRITTEN)
    inputs: list[InputFile] = []
    pieces: list[tuple[Piece, int]] = []
    for number, source in enumerate(pipeline.sources):
        files = _files_of(number, source, written)
        cut = [item for index, file in enumerate(files) for item in _cut(index, file, source.reader, target)]
        own, files = _used(_capped(cut, files, source.max_megabytes), files, len(inputs))
        inputs += files
        pieces += own
    size = sum(size for _, size in pieces)
    if not size:
        raise UserError(
            f"pipeline {pipeline.name}: empty corpus, {len(inputs)} input files with 0 bytes; give sources with text"
        )
    return Inventory(inputs, _pack(pieces, target), size)
