"""A repository as long documents: files in the order of their imports, or in random order, each under its path.

Section 2.3.2 of arXiv 2604.03044: sequences of 64K and 128K tokens from repositories. A document holds whole files of
one connected component; where a component is longer than a sequence it is cut between files, and small components of
one repository share a document. Lengths are in characters, since a tokenizer may be trained on these documents.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from data_pipeline.code.imports import imports_of
from data_pipeline.code.languages import comment_line, language_of
from data_pipeline.code.order import components, is_ordered, shuffled, topological


@dataclass(frozen=True)
class RepositoryDocument:
    """text; files: their paths in order; ordered: whether imports decide the order."""

    text: str
    files: tuple[str, ...]
    ordered: bool


def _part(path: str, text: str) -> str:
    """A file under a comment with its path."""
    return f"{comment_line(language_of(path), path)}\n{text.rstrip()}\n"


def _cut(paths: Sequence[str], parts: Mapping[str, str], longest: int) -> Iterator[tuple[str, ...]]:
    """Whole files in their order, as many as fit; a file that alone is longer stands alone."""
    group: list[str] = []
    room = longest
    for path in paths:
        if group and len(parts[path]) > room:
            yield tuple(group)
            group, room = [], longest
        group.append(path)
        room -= len(parts[path]) + 1
    if group:
        yield tuple(group)


def documents(
    name: str, files: Mapping[str, str], longest: int, ordered_share: float = 0.5
) -> Iterator[RepositoryDocument]:
    """The documents of a repository (path -> text), at most `longest` characters each unless one file is longer.

    The result depends on the repository alone.
    """
    parts = {path: _part(path, text) for path, text in files.items()}
    imports = imports_of(name, files)
    waiting: dict[bool, list[str]] = {True: [], False: []}
    for members in components(imports):
        ordered = is_ordered(name, members[0], ordered_share)
        paths = topological(members, imports) if ordered else shuffled(members, name)
        if sum(len(parts[path]) + 1 for path in paths) <= longest:
            waiting[ordered] += paths
            continue
        for group in _cut(paths, parts, longest):
            yield RepositoryDocument("\n".join(parts[path] for path in group), group, ordered)
    for ordered, paths in waiting.items():
        for group in _cut(paths, parts, longest):
            yield RepositoryDocument("\n".join(parts[path] for path in group), group, ordered)
